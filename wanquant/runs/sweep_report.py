"""``report.html`` of a sweep, and its table as ``table.md``, ``table.tex`` and ``table.csv`` beside it. Drawn from the
summary of ``evaluate.sweep`` and the videos in the run directories; the same files from the same results.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanquant.runs import pictures
from wanquant.runs.files import write_atomic
from wanquant.runs.reports import figures, sweep_table
from wanquant.runs.reports.columns import FIDELITY
from wanquant.runs.reports.report import data_uri, html_environment

#: The report stays below 20 MB: so many films at most, so many panels of prompts, and so many bytes of films.
MAX_FILMS, MAX_PANELS, MAX_BYTES = 8, 24, 12_000_000
PANEL_HEIGHT, COLUMNS = 192, 4
METRIC_LABEL = "latent SQNR, dB"


def write_sweep(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes report and tables into ``folder``; the path of the report."""
    rows = summary["rows"]
    table: sweep_table.Cells = sweep_table.cells(summary) if rows else ([], [], [])
    files = {}
    if rows:
        files = {
            "table.md": _markdown(summary, table),
            "table.tex": sweep_table.latex(*table) + "\n",
            "table.csv": sweep_table.numbers(summary),
        }
    for name, text in files.items():
        write_atomic(folder / name, text)
    template = html_environment().get_template("sweep.html.j2")
    page = template.render(
        summary=summary,
        heads=table[0],
        rows=table[1],
        floors=table[2],
        configurations=len(rows),
        text=sweep_table.protocol(summary) if rows else "",
        further=sweep_table.further_cells(summary) if rows else ([], []),
        judged=sweep_table.vbench_cells(summary) if rows else ([], [], []),
        told=next((row["vbench"] for row in rows if row["vbench"]), {}),
        ladder=sweep_table.ladder_cells(summary) if rows else ([], []),
        figures=_figures(summary) if rows else [],
        downloads=[(name, _text_uri(text)) for name, text in files.items()],
        videos=_videos(folder, rows) if rows else [],
        card=json.dumps(summary.get("protocol", {}), indent=2),
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _markdown(summary: dict[str, Any], table: sweep_table.Cells) -> str:
    parts = [sweep_table.markdown(*table), sweep_table.protocol(summary), *sweep_table.further_markdown(summary)]
    return "\n\n".join(parts) + "\n"


def _text_uri(text: str) -> str:
    return f"data:text/plain;base64,{base64.b64encode(text.encode()).decode()}"


def _figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, note, SVG)."""
    rows = [(number, row) for number, row in enumerate(summary["rows"], 1) if _finite(row)]
    if not rows:
        return []
    dots = [(f"{number}  {row['name']}", *_interval(row)) for number, row in rows]
    shares = [(row["name"], row["protect"]["fraction_of_flops_quantized"], *_interval(row)) for _, row in rows]
    prompts = list(dict.fromkeys(item["prompt"] for item in rows[0][1]["metrics"][summary["metric"]]["per_item"]))
    panels = [
        (prompt, [_of_prompt(row, summary["metric"], prompt) for _, row in rows]) for prompt in prompts[:MAX_PANELS]
    ]
    found = [
        (
            "Fidelity to BF16",
            "Mean and 95 % interval of each; the same pairs stand behind all of them, so that they differ more surely "
            "than these intervals suggest: the table has the paired differences.",
            figures.intervals(dots, METRIC_LABEL),
        )
    ]
    if len({share for _, share, *_ in shares}) > 1:
        note = "Numbers are the rows of the table. No other row beats an orange diamond in both quality and share."
        found.append(("What a block in BF16 buys", note, figures.pareto(shares, METRIC_LABEL)))
    note = "A dot a seed, a bar at their mean; numbers are the rows of the table."
    if len(prompts) > MAX_PANELS:
        note += f" The first {MAX_PANELS} of {len(prompts)} prompts."
    return [*found, ("Prompt by prompt", note, figures.small_multiples(panels, METRIC_LABEL))]


def _finite(row: dict[str, Any]) -> bool:
    metric = row["metrics"][FIDELITY[0][0]]
    return None not in (metric["mean"], *metric["ci95"], *(item["value"] for item in metric["per_item"]))


def _interval(row: dict[str, Any]) -> tuple[float, float, float]:
    metric = row["metrics"][FIDELITY[0][0]]
    return metric["mean"], *metric["ci95"]


def _of_prompt(row: dict[str, Any], metric: str, prompt: str) -> list[float]:
    return [item["value"] for item in row["metrics"][metric]["per_item"] if item["prompt"] == prompt]


def _videos(folder: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, data) for the first pair of each prompt: BF16 and every configuration in one film, so in step."""
    items = rows[0]["metrics"]["psnr"]["per_item"]
    firsts = list({item["prompt"]: place for place, item in reversed(list(enumerate(items)))}.values())
    found, size = [], 0
    for place in sorted(firsts)[:MAX_FILMS]:
        film = _film(folder, rows, f"{place:03d}-seed{items[place]['seed']}.mp4")
        size += len(film or "")
        if size > MAX_BYTES:
            break
        if film is not None:
            found.append((f"{items[place]['prompt']}, seed {items[place]['seed']}", film))
    return found


def _film(folder: Path, rows: Sequence[dict[str, Any]], name: str) -> str | None:
    """None where a run has lost its videos."""
    paths = [folder / str(rows[0]["job"]) / "videos" / "bf16" / name]
    paths += [folder / str(row["job"]) / "videos" / "quantized" / name for row in rows]
    if not all(path.is_file() for path in paths):
        return None
    labels = ["BF16", *(f"{number} {row['name']}" for number, row in enumerate(rows, 1))]
    frames = pictures.side_by_side([pictures.read_mp4(path) for path in paths], labels, COLUMNS, PANEL_HEIGHT)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        pictures.write_mp4(path, frames, fps=pictures.frames_per_second(paths[0]), crf=20)
        return data_uri(path, "video/mp4")
