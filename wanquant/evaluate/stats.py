"""Means with intervals: 95 % bootstrap, clustered by prompt.

Videos of one prompt resemble each other, so prompts, not videos, are drawn with replacement (the
cluster bootstrap, Davison & Hinkley 1997, section 3.8). Differences are taken within a pair before
anything is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Fewer (prompt, seed) pairs than this are a demonstration, not a comparison.
ENOUGH_PAIRS = 20
RESAMPLES = 10_000


@dataclass(frozen=True)
class Item:
    """One measured value of one (prompt, seed) pair."""

    prompt: str
    seed: int
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and what stands behind them.

    A value that is not finite makes the mean and both ends NaN: it is shown, not left out.
    """

    mean: float
    low: float
    high: float
    items: tuple[Item, ...]

    def as_json(self) -> dict[str, Any]:
        """The form of ``metrics`` in ``result.json``."""
        return {
            "mean": self.mean,
            "ci95": [self.low, self.high],
            "n": len(self.items),
            "per_item": [vars(item) for item in self.items],
        }


def estimate(items: Sequence[Item], seed: int = 0, comparisons: int = 1) -> Estimate:
    """The mean over all items and its interval, prompts drawn with replacement. One of so many ``comparisons`` gets a
    wider interval, so that 95 % holds for all of them together (Bonferroni).

    With a single prompt there is nothing to draw: the interval is NaN, because it is unknown.
    """
    if not items:
        raise ValueError("no values to average")
    values = np.array([item.value for item in items])
    if not np.isfinite(values).all():
        return Estimate(float("nan"), float("nan"), float("nan"), tuple(items))
    prompts = sorted({item.prompt for item in items})
    if len(prompts) == 1:
        return Estimate(float(values.mean()), float("nan"), float("nan"), tuple(items))
    sums = np.array([sum(item.value for item in items if item.prompt == prompt) for prompt in prompts])
    counts = np.array([sum(item.prompt == prompt for item in items) for prompt in prompts])
    drawn = np.random.default_rng(seed).integers(len(prompts), size=(RESAMPLES, len(prompts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025 / comparisons, 1 - 0.025 / comparisons])
    return Estimate(float(values.mean()), float(low), float(high), tuple(items))


def rank_correlation(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's: of the ranks of two measures of the same things, with a 95 % interval from drawing the things with
    replacement. NaN where one of them is constant or not finite."""
    x, y = np.array(a, float), np.array(b, float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan"), float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES // 5, len(x)))
    found = np.array([_correlation(_ranks(x[draw]), _ranks(y[draw])) for draw in drawn])
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return _correlation(_ranks(x), _ranks(y)), float(low), float(high)


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return means


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else float("nan")


def difference(ours: Sequence[Item], reference: Sequence[Item]) -> list[Item]:
    """ours - reference, pair by pair; ``ValueError`` unless both hold the same pairs."""
    known = {(item.prompt, item.seed): item.value for item in reference}
    if known.keys() != {(item.prompt, item.seed) for item in ours}:
        raise ValueError("the two runs do not hold the same (prompt, seed) pairs")
    return [Item(item.prompt, item.seed, item.value - known[item.prompt, item.seed]) for item in ours]
