"""What passed through one place of a model, read from counts and sums: percentiles, moments, zones, and what rounding
by a scale would have cost.

Percentiles are read from the histogram of ``wanquant.kernels.statistics`` and are within 1/64 of the exact order
statistic, relative. What lies beyond its end makes them NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from wanquant.formats.base import Format
from wanquant.kernels.observe_loop import LOWEST, MOMENTS, PER_OCTAVE
from wanquant.kernels.statistics import BINS, DYNAMIC_RULES, HIGHEST, ZONES, bin_edges

#: A channel is an outlier if its largest magnitude is this many times the median channel's.
OUTLIER = 10.0


@dataclass(frozen=True)
class View:
    """Figures of a part of a site, or of all of it. Whatever is NaN had a NaN or an infinity pass."""

    counts: np.ndarray
    zones: np.ndarray
    sums: np.ndarray
    channel_absmax: np.ndarray

    @property
    def elements(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def broken(self) -> bool:
        return bool(self.counts[-2:].sum())

    def _raw(self, power: int) -> float:
        return math.nan if self.broken or not self.elements else float(self.sums[power - 1]) / self.elements

    @property
    def absmax(self) -> float:
        return float(self.channel_absmax.max(initial=0.0))

    @property
    def mean(self) -> float:
        return self._raw(1)

    @property
    def std(self) -> float:
        variance = self._raw(2) - self.mean**2
        return variance if variance != variance else math.sqrt(max(0.0, variance))

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the variance squared: 3 for a normal distribution."""
        mean, variance = self.mean, self.std**2
        if not variance > 0:
            return math.nan
        fourth = self._raw(4) - 4 * mean * self._raw(3) + 6 * mean**2 * self._raw(2) - 3 * mean**4
        return fourth / variance**2

    def quantile(self, share: float) -> float:
        """The magnitude that ``share`` of the elements do not exceed, within 1/64 of the exact order statistic; NaN
        if that lies beyond the histogram."""
        if self.broken or not self.elements:
            return math.nan
        place = int(np.searchsorted(np.cumsum(self.counts), math.ceil(share * self.elements)))
        return float(min(_CENTRES[place], self.absmax)) if place < len(_CENTRES) else math.nan

    def outliers(self) -> np.ndarray:
        """Indices of the channels whose largest magnitude is ``OUTLIER`` times that of the median channel."""
        found: np.ndarray = np.flatnonzero(self.channel_absmax > OUTLIER * np.median(self.channel_absmax))
        return found

    def shares(self, scale: float | None = None) -> np.ndarray:
        """Share of the elements in each of ``ZONES`` over one scale, from the histogram; without a scale as counted
        under the first dynamic rule. NaN, infinity and what lies beyond the histogram are in none."""
        if not self.elements:
            return np.full(len(ZONES), np.nan)
        if scale is None:
            return self.zones / self.elements
        zone = np.searchsorted(np.array(ZONES), _POINTS / scale, side="right") - 1
        counted = np.zeros(len(ZONES))
        np.add.at(counted, zone, (self.counts[: len(_POINTS), None] / _POINTS.shape[1]).repeat(_POINTS.shape[1], 1))
        return counted / self.elements

    def sqnr(self, rule: str) -> float:
        """Of rounding to HiF8 under one of ``DYNAMIC_RULES``, by name, in dB."""
        place = [known.name for known in DYNAMIC_RULES].index(rule)
        return _decibel(self.sums[1], self.sums[MOMENTS + place]) if not self.broken else math.nan

    def noise(self, scale: float, format_: Format, overflow: str) -> float:
        """Sum of squared errors of rounding everything by one scale, from the histogram; infinite after an overflow
        that becomes infinite. For BF16 values a bin holds four, taken as equally frequent. NaN if something lay
        beyond the histogram."""
        if self.broken or self.counts[len(_POINTS)] or not scale > 0:
            return math.nan
        points = torch.from_numpy(_POINTS / scale).float()
        errors = (points.double() - format_.round(points, overflow).double()).square().mean(1).numpy() * scale**2
        counts = self.counts[: len(_POINTS)]
        return float(errors[counts > 0] @ counts[counts > 0])

    def static_sqnr(self, scale: float, format_: Format, overflow: str = "inf") -> float:
        """Of rounding everything by one scale, in dB; minus infinity after an overflow."""
        return _decibel(self.sums[1], self.noise(scale, format_, overflow))


def _decibel(signal: float, noise: float) -> float:
    if math.isnan(noise) or math.isnan(signal) or signal == 0:
        return math.nan
    return math.inf if noise == 0 else -math.inf if math.isinf(noise) else 10 * math.log10(signal / noise)


_EDGES = bin_edges()
#: What stands for a bin: below the first edge nothing, else its middle. For what lies beyond the last edge nothing can.
_CENTRES = np.concatenate([[0.0], (_EDGES[:-1] + _EDGES[1:]) / 2])
#: The four BF16 values in each bin, [BINS - 3, 4].
_POINTS = np.concatenate(
    [
        np.zeros((1, 4)),
        _EDGES[:-1, None] + np.diff(_EDGES)[:, None] * np.arange(4) / 4,
    ]
)
assert len(_POINTS) == len(_CENTRES) == BINS - 3 == (HIGHEST - LOWEST) * PER_OCTAVE + 1
