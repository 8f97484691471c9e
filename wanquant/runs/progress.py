"""The first line of a program; progress with the time left: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

import wanquant

BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {unit}s, {elapsed} elapsed, {remaining} left{postfix}"
#: Seconds between two lines where nobody watches.
QUIET = 15.0


def announce(program: str, what: str = "") -> None:
    """The first line of a program, before its imports, which take seconds."""
    print(f"wanquant {wanquant.__version__} {program}" + (f": {what}" if what else ""), flush=True)


class Tick(Protocol):
    """Called after each unit of work, with what is to be read beside it."""

    def __call__(self, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str = "step", done: int = 0) -> Iterator[Tick]:
    """Of ``total`` units, of which so many were ``done`` by an earlier run."""
    if not sys.stderr.isatty():
        lines = _Lines(label, total, unit, done)
        yield lines.tick
        lines.show()
        return
    with tqdm(total=total, initial=done, desc=f"{label:<20}", unit=unit, file=sys.stderr, bar_format=BAR) as bar:

        def tick(note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield tick


class _Lines:
    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.note = label, total, unit, ""
        self.done, self.earlier, self.begun = done, done, time.monotonic()
        self.shown = self.begun

    def tick(self, note: str = "") -> None:
        self.done, self.note = self.done + 1, note
        if self.done < self.total and time.monotonic() - self.shown >= QUIET:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.begun
        left = tqdm.format_interval(elapsed / max(self.done - self.earlier, 1) * (self.total - self.done))
        share = f"{100 * self.done // max(self.total, 1):3d} % {self.done}/{self.total} {self.unit}s"
        line = f"{self.label:<20} {share}, {tqdm.format_interval(elapsed)} elapsed, {left} left"
        print(f"{line}, {self.note}" if self.note else line, file=sys.stderr, flush=True)
