"""Figures of the report as SVG text, drawn by matplotlib, readable without colour and in black and white.

Bars start at zero, so where an axis is logarithmic there are dots.
"""

from __future__ import annotations

import importlib
import io
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

#: Okabe and Ito's palette for colour-blind readers; the hatch repeats what the colour says.
QUANTIZED, PROTECTED = "#56B4E9", "#D55E00"


@cache
def pyplot() -> Any:
    """matplotlib's, imported when something is drawn: it takes a second."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wanquant"  # the same figure is the same file
    matplotlib.rcParams["text.parse_math"] = False  # a prompt may have dollars in it
    return importlib.import_module("matplotlib.pyplot")


def _axes(height: float, right: float = 0.1, top: float = 0.3) -> tuple[Any, Any]:
    """A figure 9 inches wide; its margins, in inches, are what labels and a legend above fit into. To measure them,
    as ``bbox_inches="tight"`` does, is to draw everything twice."""
    figure, axes = pyplot().subplots(figsize=(9, height))
    figure.subplots_adjust(left=0.75 / 9, right=1 - right / 9, bottom=0.5 / height, top=1 - top / height)
    return figure, axes


def _styled(
    figure: Any, axes: Any, grid: str = "y", minor: bool = False, legend: int = 0, tight: bool = False, **settings: Any
) -> str:
    """The figure as SVG, after what most have in common: labels and limits (``settings``), light lines across the axis
    ``grid``, no frame at the top and the right, and a legend above, of so many columns."""
    axes.set(**settings)
    if settings.get("yscale") == "log":
        _plain_numbers(axes.yaxis)
    if grid:
        axes.grid(axis=grid, which="both" if minor else "major", color="#dddddd")
    if legend:
        axes.legend(frameon=False, ncols=legend, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, tight)


def block_magnitudes(absmax: Sequence[float | None], protected: Sequence[int]) -> str:
    """A dot a block for the largest activation magnitude behind it, on a log scale; protected ones are diamonds."""
    figure, axes = _axes(2.6)
    for kept, (color, marker, label) in enumerate(
        ((QUANTIZED, "o", "quantized"), (PROTECTED, "D", "protected (BF16)"))
    ):
        blocks = [index for index, value in enumerate(absmax) if (index in protected) == bool(kept) and value]
        values = [absmax[index] for index in blocks]
        axes.plot(blocks, values, marker, color=color, markeredgecolor="black", markersize=5, label=label)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    limits = (-0.8, len(absmax) - 0.2)
    return _styled(figure, axes, minor=True, yscale="log", xlabel="block", ylabel="largest magnitude", xlim=limits)


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """A dot and its interval for each (name, mean, low, high), with the value written beside it."""
    figure, axes = pyplot().subplots(figsize=(9, 0.5 + 0.38 * len(rows)))
    for place, (_, mean, low, high) in enumerate(reversed(rows)):
        axes.plot([low, high], [place, place], color=QUANTIZED, linewidth=4, solid_capstyle="butt")
        axes.plot(mean, place, "o", color="black")
        axes.annotate(f"{mean:.2f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in reversed(rows)])
    axes.spines["left"].set_visible(False)
    return _styled(figure, axes, grid="x", tight=True, xlabel=label, ylim=(-0.6, len(rows) - 0.3))


def heatmap(rows: Sequence[Sequence[float | None]], xlabel: str, label: str, log: bool) -> str:
    """A row a block, block 0 at the top; cividis, which colour-blind readers see as others do. Unknown is white."""
    values = np.array(rows, float)
    figure, axes = _axes(0.6 + 0.14 * len(values), right=0.2, top=0.1)
    positive = values[np.isfinite(values) & (values > 0)]
    from matplotlib.colors import LogNorm

    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.001)) if log and len(positive) else None
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", norm=norm)
    axes.set(xlabel=xlabel, ylabel="block", yticks=np.arange(0, len(values), 5) + 0.5)
    axes.set_yticklabels(range(0, len(values), 5))
    axes.set_xticks(np.arange(values.shape[1]) + 0.5, range(values.shape[1]))
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, label=label, pad=0.02)
    if norm is not None:
        _plain_numbers(bar.long_axis)
    return _svg(figure)


#: What HiF8 keeps in each of ``wanquant.kernels.statistics.ZONES``, light to dark, with a hatch that says the same.
ZONE_LOOKS = (
    ("becomes 0", "#000000", None),
    ("a power of two", "#D55E00", "///"),
    ("1 bit", "#E69F00", "..."),
    ("2 bits", "#F0E442", None),
    ("3 bits", "#56B4E9", None),
    ("2 bits, above", "#F0E442", "\\\\\\"),
    ("1 bit, above", "#E69F00", "xxx"),
    ("overflows", "#CC79A7", "+++"),
)


def zones(rows: Sequence[Sequence[float]]) -> str:
    """Stacked shares of the zones, a bar a block; zones that hold nothing are left out of the legend."""
    figure, axes = _axes(3.2, top=0.5)
    below = np.zeros(len(rows))
    values = np.array(rows, float)
    for place, (name, color, hatch) in enumerate(ZONE_LOOKS):
        label = name if values[:, place].max() > 0 else None
        axes.bar(
            range(len(rows)), values[:, place], bottom=below, color=color, hatch=hatch, label=label, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        below += values[:, place]
    axes.set(ylim=(0, 1), xlim=(-0.8, len(rows) - 0.2))
    return _styled(figure, axes, grid="", legend=6, xlabel="block", ylabel="share of elements")


def by_block(
    rows: Sequence[tuple[float | None, float | None, float | None]], protected: Sequence[int], label: str
) -> str:
    """A dot and its interval a block; protected blocks are orange diamonds."""
    figure, axes = _axes(2.8)
    for index, (mean, low, high) in enumerate(rows):
        if mean is None:
            continue
        color, marker = (PROTECTED, "D") if index in protected else (QUANTIZED, "o")
        if low is not None and high is not None:
            axes.plot([index, index], [low, high], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot(index, mean, marker, color=color, markeredgecolor="black", markersize=5)
    return _styled(figure, axes, xlabel="block", ylabel=label, xlim=(-0.8, len(rows) - 0.2))


def pareto(rows: Sequence[tuple[str, float, float, float, float]], label: str) -> str:
    """Quality against the share of FLOPs quantized, each (name, share, mean, low, high) a numbered dot; those that no
    other beats in both are diamonds, and joined. Numbers are those of the rows, from 1."""
    figure, axes = _axes(3.6)
    best = [row for row in rows if not any(_beats(other, row) for other in rows)]
    for number, row in enumerate(rows, 1):
        _, share, mean, low, high = row
        front = row in best
        axes.plot([share, share], [low, high], color=PROTECTED if front else QUANTIZED, linewidth=2)
        axes.plot(share, mean, "D" if front else "o", color=PROTECTED if front else QUANTIZED, markeredgecolor="black")
        axes.annotate(str(number), (share, mean), (6, -3), textcoords="offset points", fontsize=8)
    line = sorted((row[1], row[2]) for row in best)
    axes.plot([x for x, _ in line], [y for _, y in line], color=PROTECTED, linewidth=1, linestyle="--")
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return _styled(figure, axes, grid="both", xlabel="share of the linears' FLOPs quantized", ylabel=label)


def _beats(ours: tuple[str, float, float, float, float], theirs: tuple[str, float, float, float, float]) -> bool:
    """No worse in share and mean, and better in one of them."""
    return ours[1] >= theirs[1] and ours[2] >= theirs[2] and ours[1:3] != theirs[1:3]


def small_multiples(panels: Sequence[tuple[str, Sequence[Sequence[float]]]], label: str) -> str:
    """A panel a prompt: for each configuration, numbered from 1, a dot a seed and a bar at their mean."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot().subplots(
        lines, columns, figsize=(9, 0.4 + 1.9 * lines), sharex=True, sharey=True, squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, configurations) in zip(grid.flat, panels, strict=False):
        for number, values in enumerate(configurations, 1):
            axes.plot([number] * len(values), values, "o", color=QUANTIZED, markersize=3)
            axes.plot([number - 0.3, number + 0.3], [np.mean(values)] * 2, color="black", linewidth=1.2)
        axes.set_title(textwrap.fill(textwrap.shorten(title, 60, placeholder=" …"), 31), fontsize=6.5)
        axes.set_xticks(range(1, len(configurations) + 1))
        axes.tick_params(labelsize=6)
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel(label, fontsize=8)
    figure.tight_layout()
    return _svg(figure, tight=True)


def curves(steps: Sequence[int], lines: Mapping[str, Sequence[float | None]], label: str, log: bool) -> str:
    """Lines over training steps, told apart by dashes as well as by colour."""
    figure, axes = _axes(2.6)
    looks = zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), ("-", "--", ":", "-."), strict=True)
    for (name, values), (color, dashes) in zip(lines.items(), looks, strict=False):
        axes.plot(steps, np.array(values, float), dashes, color=color, linewidth=1.2, label=name)
    scale, legend = "log" if log else "linear", 4 if len(lines) > 1 else 0
    return _styled(figure, axes, grid="both", legend=legend, xlabel="step", ylabel=label, yscale=scale)


def over_sigma(lines: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """SQNR of single denoising steps over the noise level, from noise at the left to the video at the right, of each
    (label, single steps of a result); with its interval where there are few lines. Empty where there is one step."""
    if len(lines[0][1]["sigma"]) < 2:
        return ""
    figure, axes = _axes(3.4, right=1.6 if len(lines) > 4 else 0.1, top=0.5)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for place, (label, steps) in enumerate(lines):
        means = np.array([step["mean"] for step in steps["by_step"]], float)
        bounds = np.array([step["ci95"] for step in steps["by_step"]], float)
        color, dashes = colors[place % len(colors)], ("-", "--", ":", "-.")[place % 4]
        axes.plot(steps["sigma"], means, dashes, color=color, linewidth=1.4, marker=".", markersize=4, label=label)
        if len(lines) <= 4:
            axes.fill_between(steps["sigma"], *bounds.T, color=color, alpha=0.2, linewidth=0)
    if len(lines) > 4:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    axes.invert_xaxis()
    legend = len(lines) if len(lines) <= 4 else 0
    return _styled(figure, axes, grid="both", legend=legend, xlabel="noise level, sigma", ylabel="SQNR, dB")


def before_after(rows: Sequence[tuple[int, float, float]], label: str) -> str:
    """For each (block, before, after) a hollow dot, a full one, and a line between."""
    figure, axes = _axes(2.8)
    for place, (block, before, after) in enumerate(rows):
        axes.plot([block, block], [before, after], color=QUANTIZED, linewidth=2)
        axes.plot(block, before, "o", color="white", markeredgecolor="black", label=None if place else "before")
        axes.plot(block, after, "o", color="black", label=None if place else "after")
    return _styled(figure, axes, legend=2, xlabel="block", ylabel=label, yscale="log")


def _plain_numbers(axis: Any) -> None:
    """Labels of a logarithmic axis as 100 and 1e+05: typesetting powers takes longer than all else in a figure."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def _svg(figure: Any, tight: bool = False) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight" if tight else None, metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
