"""The report of ``mode=analyze``: figures of the result, each with its data as CSV to download from the file itself."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment

from wanquant.runs.reports import figures

HARDEST = 20
#: Rules shown in the table of linears, by their names in the result.
RULES = (
    "per_token amax/15",
    "per_token pow2/15",
    "per_tensor amax/15",
    "static amax/15",
    "static direct",
    "static mse",
)
COLUMNS = (
    "block",
    "residual_absmax",
    "input_absmax",
    "kurtosis",
    "few_bits",
    "input_sqnr",
    "block_sqnr",
    "sensitivity",
)


def analysis_html(environment: Environment, folder: Path, result: dict[str, Any]) -> str:
    environment.filters["short"] = short
    analysis = result["analysis"]
    modules = sorted(analysis["modules"], key=lambda row: _number(row["sqnr"][RULES[0]]))
    columns = [name for name in COLUMNS if name in analysis["blocks"][0]]
    tables = {path.stem: _csv_uri(path) for path in sorted((folder / "analysis").glob("*.csv"))}
    return environment.get_template("analysis.html.j2").render(
        result=result,
        figures=list(_figures(analysis, result["protect"]["blocks"])),
        tables=tables,
        columns=columns,
        rules=RULES,
        hardest=modules[:HARDEST],
        settings=json.dumps({key: result[key] for key in ("quant", "protect", "generation", "provenance")}, indent=2),
    )


def _figures(analysis: dict[str, Any], protected: list[int]) -> Any:
    """(title, note, name of the table, SVG) of each figure."""
    blocks, statistic = analysis["blocks"], analysis["statistic"]

    def column(name: str) -> list[float | None]:
        return [row[name] for row in blocks]

    yield (
        "Largest activation behind each block",
        "The residual stream, over all videos, steps and branches.",
        "blocks",
        figures.block_magnitudes(column("residual_absmax"), protected),
    )
    yield (
        "Largest activation that enters a linear of each block",
        "What is rounded when the block is quantized.",
        "blocks",
        figures.block_magnitudes(column("input_absmax"), protected),
    )
    for name, what in (("stream", "the residual stream behind each block"), ("inputs", "what enters its linears")):
        yield (
            f"{statistic} by block and denoising step: {what}",
            "Step 0 is the noisiest.",
            f"heatmap_{name}",
            figures.heatmap(analysis["heatmaps"][name], "denoising step", statistic, log=statistic != "sqnr"),
        )
    yield (
        "Mantissa bits of what enters the linears",
        "Share of the elements in each zone of HiF8, each token scaled to 15.",
        "zones",
        figures.zones(analysis["zones"]),
    )
    for name, label in (("block_sqnr", "SQNR of the block's output, dB"), ("sensitivity", "SQNR of the latents, dB")):
        if name in blocks[0]:
            yield (
                "Each block quantized alone: " + ("its own output" if name == "block_sqnr" else "the final latents"),
                "Means over pairs with 95 % bootstrap intervals, prompts drawn with replacement. Low is harmful. The "
                "same pairs stand behind every block, so that blocks differ more surely than their intervals suggest.",
                "blocks",
                figures.by_block(
                    [(row[name], row[f"{name}_low"], row[f"{name}_high"]) for row in blocks], protected, label
                ),
            )
    if analysis["kinds"]:
        rows = [
            (row["kind"], row["sensitivity"], row["sensitivity_low"], row["sensitivity_high"])
            for row in analysis["kinds"]
            if None not in (row["sensitivity"], row["sensitivity_low"], row["sensitivity_high"])
        ]
        yield (
            "Each kind of linear quantized alone, in all blocks",
            "As above.",
            "kinds",
            figures.intervals(rows, "SQNR of the final latents, dB") if rows else "",
        )


def analysis_summary(result: dict[str, Any], folder: Path) -> str:
    rows = result["analysis"]["stand_out"]
    lines = ["", *result["calibration"]["coverage"], ""]
    lines += [
        f"{'block':<7}{'value':>10}{'median':>10}  stands out by" if rows else "no block stands out by any measure"
    ]
    lines += [
        f"{row['block']:<7}{short(row['value']):>10}{short(row['median']):>10}  {row['meaning']}" for row in rows[:20]
    ]
    if len(rows) > 20:
        lines.append(f"and {len(rows) - 20} more")
    for row in result["analysis"]["correlation"]:
        low, high = row["ci95"]
        interval = f"{short(row['spearman'])} [{short(low)}, {short(high)}]"
        lines.append(f"rank correlation with sensitivity: {row['measure']:<16} {interval}")
    if result["demonstration"]:
        lines.append(f"caution: {result['calibration']['pairs']} (prompt, seed) pairs are a demonstration")
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def short(value: Any) -> str:
    """Three figures; a dash for what is unknown."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


def _csv_uri(path: Path) -> str:
    return f"data:text/csv;base64,{base64.b64encode(path.read_bytes()).decode()}"
