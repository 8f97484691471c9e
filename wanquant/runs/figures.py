"""Figures of the report as SVG text, drawn by matplotlib, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

#: Okabe and Ito's palette for colour-blind readers; the hatch repeats what the colour says.
QUANTIZED, PROTECTED = "#56B4E9", "#D55E00"


def block_magnitudes(absmax: Sequence[float | None], protected: Sequence[int]) -> str:
    """Bars of the largest activation magnitude behind each block, log scale, protected blocks hatched."""
    figure, axes = plt.subplots(figsize=(9, 2.6))
    for index, value in enumerate(absmax):
        kept = index in protected
        axes.bar(
            index,
            value or 0.0,
            color=PROTECTED if kept else QUANTIZED,
            hatch="///" if kept else None,
            edgecolor="white" if kept else "none",
            linewidth=0,
        )
    axes.set(yscale="log", xlabel="block", ylabel="largest magnitude", xlim=(-0.8, len(absmax) - 0.2))
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=QUANTIZED),
        plt.Rectangle((0, 0), 1, 1, fc=PROTECTED, hatch="///", ec="white"),
    ]
    axes.legend(
        handles, ["quantized", "protected (BF16)"], frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """A dot and its interval for each (name, mean, low, high), with the value written beside it."""
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.38 * len(rows)))
    for place, (_, mean, low, high) in enumerate(reversed(rows)):
        axes.plot([low, high], [place, place], color=QUANTIZED, linewidth=4, solid_capstyle="butt")
        axes.plot(mean, place, "o", color="black")
        axes.annotate(f"{mean:.2f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in reversed(rows)], xlabel=label)
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.grid(axis="x", color="#dddddd")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return _svg(figure)


def _svg(figure: plt.Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
