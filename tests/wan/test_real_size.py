"""Bars of the true shape, at that of Wan2.1-T2V-1.3B: ``python -m benchmarks.real_size`` is the same at 14B."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_size import measure


@pytest.mark.slow
def test_no_bar_is_missed_at_the_shape_of_1_3b(tmp_path: Path) -> None:
    rows = measure(tmp_path, "1.3b", None, threads=2)
    assert [f"{row.name}: {row.ratio:.3f} for {row.bar}" for row in rows if row.verdict == "MISSED"] == []
    assert sum(row.bar is not None for row in rows) == 5
