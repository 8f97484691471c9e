"""The program for a card, on the CPU at small size: that it runs to its end, and finds all bits right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.card import PARTS, Place, measured
from benchmarks.timing import Row


@pytest.mark.slow
def test_every_part_of_it_runs() -> None:
    written: list[Row] = []

    def write(rows: list[Row], failed: list[str]) -> None:
        written[:] = rows

    place, parts = Place(torch.device("cpu"), small=True), [part for part in PARTS if part != "job"]
    assert measured(place, parts, 1e6, write) == []
    found = {row.name: row for row in written}
    assert found["elements that differ from the definition"].ours == 0
    assert found["elements that differ from the definition"].theirs > 1e6
    assert all(row.bar is None for name, row in found.items() if name.startswith(("linear ", "encode")))
    errors = [row for name, row in found.items() if name.startswith("error against fast")]
    assert len(errors) >= 4
    assert all(row.verdict == "met" for row in errors)
    assert not any(row.ratio != row.ratio for row in written)  # as that of a linear that failed
    assert measured(place, ["bits"], 1.0, write) == ["bits: not begun, for want of time"]
