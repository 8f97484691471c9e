"""Progress lines with the time left: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left"
#: Seconds between two lines where nobody watches.
QUIET = 15.0


@contextmanager
def progress(label: str, total: int, unit: str = "step") -> Iterator[Callable[[], None]]:
    """Yields a function to call after each unit of work."""
    if not sys.stderr.isatty():
        lines = _Lines(label, total, unit)
        yield lines.tick
        lines.show()
        return
    with tqdm(total=total, desc=f"{label:<20}", unit=unit, file=sys.stderr, bar_format=BAR) as bar:

        def tick() -> None:
            bar.update()

        yield tick


class _Lines:
    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.begun = 0, time.monotonic()
        self.shown = self.begun

    def tick(self) -> None:
        self.done += 1
        if self.done < self.total and time.monotonic() - self.shown >= QUIET:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        gone = self.shown - self.begun
        left = tqdm.format_interval(gone / max(self.done, 1) * (self.total - self.done))
        share = f"{100 * self.done // max(self.total, 1):3d} % {self.done}/{self.total} {self.unit}s"
        print(f"{self.label:<20} {share}, {tqdm.format_interval(gone)} gone, {left} left", file=sys.stderr, flush=True)
