"""Means with intervals at 95 %, clustered by prompt.

Videos of one prompt resemble each other, so prompts, not videos, are drawn with replacement (the
cluster bootstrap, Davison & Hinkley 1997, section 3.8). Differences are taken within a pair before
anything is averaged.

Comparisons get Student's interval over prompts instead (``compared``). A bootstrap ends at the most extreme prompts it
has, so that no correction for the number of comparisons can widen it: of twelve prompts and five equal configurations
it would call one different 13 times in a hundred, and not 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

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


def estimate(items: Sequence[Item], seed: int = 0) -> Estimate:
    """The mean over all items and its interval, prompts drawn with replacement.

    With a single prompt there is nothing to draw: the interval is NaN, because it is unknown.
    """
    mean, sums, counts = _by_prompt(items)
    if len(sums) < 2 or math.isnan(mean):
        return Estimate(mean, math.nan, math.nan, tuple(items))
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), tuple(items))


def compared(items: Sequence[Item], comparisons: int = 1) -> Estimate:
    """The mean of paired differences, one of so many ``comparisons``, with an interval so wide that 95 % holds for all
    of them together (Bonferroni): Student's over prompts, with one degree of freedom less than there are.

    The mean is a ratio of sums over prompts; its standard error is that of the linearized ratio (Cochran 1977, section
    6.3), which for as many pairs of each prompt is the one of the prompts' means.
    """
    mean, sums, counts = _by_prompt(items)
    prompts = len(sums)
    if prompts < 2 or math.isnan(mean):
        return Estimate(mean, math.nan, math.nan, tuple(items))
    residuals = (sums - mean * counts) / counts.mean()
    error = math.sqrt(float(np.square(residuals).sum()) / (prompts * (prompts - 1)))
    half = float(stdtrit(prompts - 1, 1 - 0.025 / comparisons)) * error
    return Estimate(mean, mean - half, mean + half, tuple(items))


def detectable(found: Estimate, comparisons: int = 1, power: float = 0.8) -> float:
    """The difference of which an interval as wide as ``compared`` has found would leave out 0 so often; NaN where there
    is no interval."""
    degrees = len({item.prompt for item in found.items}) - 1
    if degrees < 1:
        return math.nan
    critical = float(stdtrit(degrees, 1 - 0.025 / comparisons))
    return (found.high - found.low) / 2 * (1 + float(stdtrit(degrees, power)) / critical)


def _by_prompt(items: Sequence[Item]) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean, NaN where a value is not finite, and of each prompt the sum and the number of its values."""
    if not items:
        raise ValueError("no values to average")
    values = np.array([item.value for item in items])
    mean = float(values.mean()) if np.isfinite(values).all() else math.nan
    prompts = {prompt: place for place, prompt in enumerate(sorted({item.prompt for item in items}))}
    where = [prompts[item.prompt] for item in items]
    return mean, np.bincount(where, values), np.bincount(where).astype(float)


def rank_correlation(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's: of the ranks of two measures of the same things, with a 95 % interval from drawing the things with
    replacement. NaN where one of them is constant or not finite."""
    x, y = np.array(a, float), np.array(b, float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan, math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES // 5, len(x)))
    found = _correlations(_ranks(x[drawn]), _ranks(y[drawn]))
    low, high = np.nanquantile(found, [0.025, 0.975]) if np.isfinite(found).any() else (np.nan, np.nan)
    return float(_correlations(_ranks(x[None]), _ranks(y[None]))[0]), float(low), float(high)


def _ranks(rows: np.ndarray) -> np.ndarray:
    """In each row, from 0; equal values share the mean of their ranks."""
    one, other = rows[:, :, None], rows[:, None, :]
    ranks: np.ndarray = (one > other).sum(2) + ((one == other).sum(2) - 1) / 2
    return ranks


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one is constant."""
    x, y = (each - each.mean(1, keepdims=True) for each in (x, y))
    spread = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    found: np.ndarray = np.divide((x * y).sum(1), spread, out=np.full(len(x), np.nan), where=spread > 0)
    return found


def difference(ours: Sequence[Item], reference: Sequence[Item]) -> list[Item]:
    """ours - reference, pair by pair; ``ValueError`` unless both hold the same pairs."""
    known = {(item.prompt, item.seed): item.value for item in reference}
    if known.keys() != {(item.prompt, item.seed) for item in ours}:
        raise ValueError("the two runs do not hold the same (prompt, seed) pairs")
    return [Item(item.prompt, item.seed, item.value - known[item.prompt, item.seed]) for item in ours]
