"""What passed through a model, by place, denoising-step bin and guidance branch: collected online, merged exactly.

A *site* is the input or the output of a linear, or the residual stream behind a block. Nothing is kept of the
tensors themselves. Counts are integers and largest magnitudes are maxima, so they merge exactly in any order; sums
of floats would not, so they are kept per video and added by ``math.fsum``, whose result is correctly rounded and
therefore knows no order. Statistics merged from parts are equal, bit for bit, to those of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from wanquant.kernels.statistics import BINS, SUMS, ZONES, Observed
from wanquant.quant.view import View

INPUT, OUTPUT, RESIDUAL = "input", "output", "residual"
BRANCHES = ("cond", "uncond")
#: AMCT's *Quantile*: the running largest magnitude is 0.99 of itself and 0.01 of the new one.
EMA_KEPT = 0.99


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

    def steps_of(self, bin_: int) -> list[int]:
        return [step for step in range(self.steps) if self.bin_of(step) == bin_]


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
    """

    absmax: np.ndarray
    calls: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    zones: np.ndarray
    sums: np.ndarray
    channel_absmax: np.ndarray
    channel_square: np.ndarray

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
        )

    def note(self, place: tuple[int, int, int], absmax: float, rows: int) -> None:
        """The largest magnitude alone. NaN is kept, not skipped."""
        old = self.absmax[place]
        self.absmax[place] = absmax if absmax != absmax or absmax > old else old
        self.calls[place] += 1
        self.rows[place] += rows

    def add(self, place: tuple[int, int, int], bin_: int, seen: Observed, rows: int) -> None:
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


@dataclass
class Statistics:
    """All sites of a model by name, ``blocks.3.attn1.to_q:input`` or ``blocks.3:residual``."""

    layout: Layout
    sites: dict[str, Site] = field(default_factory=dict)

    def site(self, name: str, kind: str) -> Site:
        return self.sites[f"{name}:{kind}"]

    def input_absmax(self) -> dict[str, float]:
        """By linear, of its input."""
        return {name.removesuffix(":input"): site.largest() for name, site in self._of(INPUT)}

    def rows(self) -> dict[str, int]:
        """Rows that entered each linear."""
        return {name.removesuffix(":input"): int(site.rows.sum()) for name, site in self._of(INPUT)}

    def _of(self, kind: str) -> list[tuple[str, Site]]:
        return [(name, site) for name, site in self.sites.items() if name.endswith(f":{kind}")]

    def block_inputs(self, block: int, blocks: str = "blocks") -> dict[str, Site]:
        """Of the linears inside one block, by their full names."""
        start = f"{blocks}.{block}."
        found = {name.removesuffix(f":{INPUT}"): site for name, site in self._of(INPUT)}
        return {name: site for name, site in found.items() if name.startswith(start)}

    def own_inputs(self, block: int, blocks: str = "blocks") -> dict[str, Site]:
        """Of those, what is not the same in every block: the text that cross-attention reads says nothing of one."""
        first = {name.removeprefix(f"{blocks}.0."): site for name, site in self.block_inputs(0, blocks).items()}
        other = {name.removeprefix(f"{blocks}.1."): site for name, site in self.block_inputs(1, blocks).items()}
        shared = {k for k in first.keys() & other.keys() if np.array_equal(first[k].absmax, other[k].absmax, True)}
        inputs = self.block_inputs(block, blocks)
        return {name: site for name, site in inputs.items() if name.removeprefix(f"{blocks}.{block}.") not in shared}

    def coverage(self) -> list[str]:
        """What stands behind the figures, in a line, and a warning for each bin or branch in which nothing passed."""
        layout = self.layout
        tokens = max((int(site.rows.sum()) for site in self.sites.values()), default=0)
        calls = sum(site.calls for site in self.sites.values()) if self.sites else np.zeros((1, 1, 1))
        seen = np.asarray(calls) > 0
        branches = [name for place, name in enumerate(BRANCHES[: layout.branches]) if seen[:, :, place].any()]
        lines = [
            f"{int(seen.any((1, 2)).sum())} of {len(layout.videos)} videos, {int(seen.any((0, 2)).sum())} of "
            f"{layout.steps} steps in {layout.bins} bins, branches {' and '.join(branches) or 'none'}, "
            f"{tokens:,} tokens, {len(self.sites)} sites"
        ]
        for bin_ in range(layout.bins):
            steps = layout.steps_of(bin_)
            for branch in range(layout.branches):
                if not seen[:, steps, branch].any():
                    lines.append(f"warning: nothing seen in step bin {bin_}, branch {BRANCHES[branch]}")
        return lines

    def merged(self, other: Statistics) -> Statistics:
        """Of the videos of both, ours first. ``ValueError`` unless all else is the same and no video is in both."""
        same = replace(self.layout, videos=()) == replace(other.layout, videos=())
        if not same or self.sites.keys() != other.sites.keys():
            raise ValueError("statistics of different models, steps or bins cannot be merged")
        twice = set(self.layout.videos) & set(other.layout.videos)
        if twice:
            raise ValueError(f"both statistics have seen {min(twice)}")
        layout = replace(self.layout, videos=self.layout.videos + other.layout.videos)
        return Statistics(layout, {name: _merged(site, other.sites[name]) for name, site in self.sites.items()})


def _merged(a: Site, b: Site) -> Site:
    def videos(name: str) -> np.ndarray:
        return np.concatenate([getattr(a, name), getattr(b, name)])

    return Site(
        videos("absmax"),
        videos("calls"),
        videos("rows"),
        a.counts + b.counts,
        a.zones + b.zones,
        videos("sums"),
        np.maximum(a.channel_absmax, b.channel_absmax),
        videos("channel_square"),
    )


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Of all videos, in the order of the parts."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole
