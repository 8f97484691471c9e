"""Timing two things side by side: alternately, in one process, the ratio of their medians.

Machines are noisy, so a duration means little by itself; what slows one of a pair slows the other too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``ours`` and ``theirs`` in seconds (or bytes); the bar is met by a ratio ours / theirs of at most ``bar``."""

    name: str
    beside: str
    ours: float
    theirs: float
    bar: float | None = None
    #: Neither bytes nor seconds, but numbers.
    plain: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def verdict(self) -> str:
        return "" if self.bar is None else "met" if self.ratio <= self.bar else "MISSED"


def compare(
    name: str,
    ours: Callable[[], object],
    beside: str,
    theirs: Callable[[], object],
    bar: float | None = None,
    rounds: int = 15,
) -> Row:
    """Each once for warmth, then ``rounds`` times in turn."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, kept in zip((ours, theirs), times, strict=True):
            begun = time.perf_counter()
            call()
            kept.append(time.perf_counter() - begun)
    return Row(name, beside, statistics.median(times[0]), statistics.median(times[1]), bar)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| what | beside | ours | theirs | ratio | bar | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:g}"
        shown = [f"{value:.2f}" if row.plain else _show(value) for value in (row.ours, row.theirs)]
        cells = (row.name, row.beside, *shown, f"{row.ratio:.2f}", bar, row.verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _show(value: float) -> str:
    """Bytes, which are many, or seconds."""
    if value > 1e4:
        return f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"
    return f"{value * 1e3:.2f} ms" if value < 10 else f"{value:.1f} s"
