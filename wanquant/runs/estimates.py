"""An estimate in words."""

from __future__ import annotations

from typing import Any


def estimate_text(metric: dict[str, Any], decimals: int | None = None) -> str:
    """``23.4 [22.9, 24.0]``; a dash for what is unknown."""
    mean, low, high = (_number(value, decimals) for value in (metric["mean"], *metric["ci95"]))
    return f"{mean} [{low}, {high}]"


def _number(value: float | None, decimals: int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{decimals if decimals is not None else 3 if abs(value) < 1.5 else 2}f}"


def verdict_word(metric: dict[str, Any]) -> str:
    """Of a paired difference."""
    low, high = metric["ci95"]
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high:
        return "no difference found"
    return "higher" if low > 0 else "lower"
