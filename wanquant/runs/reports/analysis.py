"""The report of ``mode=analyze``: figures of the result, each with its data as CSV to download from the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanquant.runs.reports import figures
from wanquant.runs.reports.columns import short
from wanquant.runs.reports.page import data_uri
from wanquant.runs.reports.table import Table

#: Linears in the table of those that are hardest to round, and by which rule they are.
HARDEST, HARDEST_BY = 20, "per_token amax/15"
#: What the figures of blocks quantized alone measure.
ALONE = {"block_sqnr": "SQNR of the block's output, dB", "sensitivity": "SQNR of single steps, dB"}


def stand_out_table(result: dict[str, Any]) -> Table:
    """The first of the blocks that stand out."""
    rows = [
        [str(row["block"]), short(row["value"]), short(row["median"]), row["meaning"]]
        for row in result["analysis"]["stand_out"][:20]
    ]
    return Table(["block", "value", "median", "stands out by"], rows)


def analysis_pictures(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """For the page."""
    analysis = result["analysis"]
    modules = sorted(analysis["modules"], key=lambda row: _number(row["sqnr"][HARDEST_BY]))
    paths = sorted((folder / "analysis").glob("*.csv"))
    return {
        "figures": _figures(analysis, result["protect"]["blocks"]),
        "csv": {path.stem: data_uri(path, "text/csv") for path in paths},
        "hardest": modules[:HARDEST],
    }


def _figures(analysis: dict[str, Any], protected: list[int]) -> dict[str, str]:
    """SVG of each figure, by name."""
    blocks, statistic = analysis["blocks"], analysis["statistic"]
    found = {
        name: figures.block_magnitudes([row[name] for row in blocks], protected)
        for name in ("residual_absmax", "input_absmax")
    }
    for name in ("stream", "inputs"):
        rows = analysis["heatmaps"][name]
        found[name] = figures.heatmap(rows, "denoising step", statistic, log=statistic != "sqnr")
    found["zones"] = figures.zones(analysis["zones"])
    for name, label in ALONE.items():
        if name in blocks[0]:
            found[name] = figures.by_block([_bounds(row, name) for row in blocks], protected, label)
    if analysis["kinds"]:
        kinds = [(row["kind"], *_bounds(row, "sensitivity")) for row in analysis["kinds"]]
        known = [row for row in kinds if None not in row]
        found["kinds"] = figures.intervals(known, "SQNR of single steps, dB") if known else ""
    return found


def _bounds(row: dict[str, Any], name: str) -> tuple[Any, Any, Any]:
    """Mean, low, high."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value
