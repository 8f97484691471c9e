"""Progress lines with the time left, in a terminal and in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(label: str, total: int, unit: str = "step") -> Iterator[Callable[[], None]]:
    """Yields a function to call after each unit of work. Where nobody watches, a line every 15 seconds."""
    watched = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=f"{label:<22}",
        unit=unit,
        file=sys.stderr,
        mininterval=0.2 if watched else 15.0,
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} left",
    ) as bar:

        def tick() -> None:
            bar.update()

        yield tick
