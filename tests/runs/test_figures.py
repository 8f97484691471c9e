"""Figures say what they are meant to say."""

from __future__ import annotations

import re

from wanquant.runs.reports.figures import block_magnitudes


def heights(svg: str) -> list[float]:
    """Of the markers behind the first group, from the top of the figure."""
    return [
        float(y)
        for y in re.findall(r'<use xlink:href="#m\w+" x="[\d.]+" y="([\d.]+)" style="fill: #(?:56b4e9|d55e00)', svg)
    ]


def test_magnitudes_are_dots_on_a_log_axis() -> None:
    """A bar would begin at a zero that the axis does not have."""
    values = [10.0, 1000.0, 100.0, None, 10.0]
    svg = block_magnitudes(values, protected=[0, 1])
    found = heights(svg)[:4]
    assert len(found) == 4
    quantized, protected = found[:2], found[2:]
    # Equal steps for equal factors.
    assert abs((quantized[1] - quantized[0]) - (protected[0] - protected[1]) / 2) < 0.01
    assert quantized[1] == protected[0]
    assert svg == block_magnitudes(values, protected=[0, 1])
