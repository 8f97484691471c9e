"""One *site* of a model: the input or the output of a linear, or the residual stream behind a block.

``Site`` has the running figures of what passed there, ``View`` what is read from them: percentiles, moments, zones, and
what rounding by a scale would have cost. Nothing is kept of the tensors themselves. Counts are integers and largest
magnitudes are maxima, so they merge exactly in any order; sums of floats would not, so they are kept per video and
added by ``math.fsum``, whose result is correctly rounded and therefore knows no order.

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
from wanquant.kernels.statistics import BINS, DYNAMIC_RULES, HIGHEST, SUMS, ZONES, Observed, bin_edges

#: A channel is an outlier if its largest magnitude is this many times the median channel's.
OUTLIER = 10.0
#: AMCT's *Quantile*: the running largest magnitude is 0.99 of itself and 0.01 of the new one.
EMA_KEPT = 0.99
#: Fields of ``Site`` whose first dimension is videos.
BY_VIDEO = ("absmax", "calls", "rows", "sums", "channel_square")
#: Where a forward pass belongs: index of the video, denoising step, guidance branch.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Which videos were seen, of how many denoising steps, and into how many bins those go; branches of guidance.

    ``full`` is everything; without it only the largest magnitudes are kept, at next to no cost.
    """

    videos: tuple[str, ...]
    steps: int
    bins: int = 4
    branches: int = 2
    full: bool = True

    def bin_of(self, step: int) -> int:
        return step * self.bins // self.steps


@dataclass
class Site:
    """The running figures of one site.

    absmax           float32 [videos, steps, branches]: 0 where nothing passed (``calls`` is 0), NaN where one did
    calls, rows      int64 [videos, steps, branches]
    counts           int64 [bins, branches, BINS]
    zones            int64 [bins, branches, len(ZONES)], under the first dynamic rule
    sums             float64 [videos, bins, branches, SUMS]
    channel_absmax   float32 [bins, branches, channels]
    channel_square   float64 [videos, channels]: sums of squares, of inputs
    timesteps        float32 [steps], the same in all videos; NaN where nothing passed, or the model takes none
    """

    absmax: np.ndarray
    calls: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    zones: np.ndarray
    sums: np.ndarray
    channel_absmax: np.ndarray
    channel_square: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def empty(cls, layout: Layout, channels: int, with_square: bool) -> Site:
        by_step = (len(layout.videos), layout.steps, layout.branches)
        bins = (layout.bins if layout.full else 0, layout.branches)
        return cls(
            np.zeros(by_step, np.float32),
            np.zeros(by_step, np.int64),
            np.zeros(by_step, np.int64),
            np.zeros((*bins, BINS), np.int64),
            np.zeros((*bins, len(ZONES)), np.int64),
            np.zeros((len(layout.videos), *bins, SUMS)),
            np.zeros((*bins, channels), np.float32),
            np.zeros((len(layout.videos), channels if layout.full and with_square else 0)),
            np.full(layout.steps, np.nan, np.float32),
        )

    def merged(self, other: Site) -> Site:
        """Of the videos of both, ours first."""
        found = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in BY_VIDEO}
        found["channel_absmax"] = np.maximum(self.channel_absmax, other.channel_absmax)
        found["timesteps"] = np.where(np.isnan(self.timesteps), other.timesteps, self.timesteps)
        return Site(counts=self.counts + other.counts, zones=self.zones + other.zones, **found)

    def note(self, place: Place, absmax: float, rows: int) -> None:
        """The largest magnitude alone. NaN is kept, not skipped."""
        old = self.absmax[place]
        self.absmax[place] = absmax if absmax != absmax or absmax > old else old
        self.calls[place] += 1
        self.rows[place] += rows

    def add(self, place: Place, bin_: int, seen: Observed, rows: int) -> None:
        video, _, branch = place
        self.note(place, seen.absmax, rows)
        self.counts[bin_, branch] += seen.counts
        self.zones[bin_, branch] += seen.zones
        self.sums[video, bin_, branch] += seen.sums
        np.maximum(self.channel_absmax[bin_, branch], seen.channel_absmax, out=self.channel_absmax[bin_, branch])
        if self.channel_square.size:
            self.channel_square[video] += seen.channel_square

    def view(self, bin_: int | None = None, branch: int | None = None) -> View:
        """All that passed in one bin or branch, or in all of them."""
        bins = slice(None) if bin_ is None else slice(bin_, bin_ + 1)
        branches = slice(None) if branch is None else slice(branch, branch + 1)
        sums = self.sums[:, bins, branches].reshape(-1, SUMS)
        return View(
            self.counts[bins, branches].sum((0, 1)),
            self.zones[bins, branches].sum((0, 1)),
            np.array([math.fsum(column) for column in sums.T]) if len(sums) else np.zeros(SUMS),
            self.channel_absmax[bins, branches].max((0, 1), initial=0.0),
        )

    def largest(self) -> float:
        """Over everything; NaN if a NaN passed."""
        return float(self.absmax.max(initial=0.0))

    def ema(self) -> float:
        """The running largest magnitude after all calls, in their order: videos, steps, branches."""
        trace = self.absmax[self.calls > 0]
        value = float(trace[0]) if len(trace) else 0.0
        for new in trace[1:]:
            value = EMA_KEPT * value + (1 - EMA_KEPT) * float(new)
        return value

    def mean_square(self) -> np.ndarray:
        """Of each channel, float64 [channels]; empty for a site that did not collect it."""
        total = np.array([math.fsum(column) for column in self.channel_square.T])
        return total / max(1, int(self.rows.sum()))


@dataclass(frozen=True)
class View:
    """Figures of a part of a site, or of all of it; NaN where a NaN or an infinity passed."""

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
_POINTS = np.concatenate([np.zeros((1, 4)), _EDGES[:-1, None] + np.diff(_EDGES)[:, None] * np.arange(4) / 4])
assert len(_POINTS) == len(_CENTRES) == BINS - 3 == (HIGHEST - LOWEST) * PER_OCTAVE + 1
