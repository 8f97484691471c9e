"""``report.html`` of a sweep, and its table as ``table.md``, ``table.tex`` and ``table.csv`` beside it. Drawn from the
summary of ``evaluate.sweep.summary`` and the videos in the run directories; the same files from the same results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanquant.runs import pictures
from wanquant.runs.files import write_atomic
from wanquant.runs.reports import figures, sweep_table
from wanquant.runs.reports.columns import STEP_SQNR, head, interval
from wanquant.runs.reports.page import data_uri, render
from wanquant.runs.reports.table import latex, markdown, markdown_text

#: The report stays below 20 MB: so many films at most, so many panels of prompts, and so many bytes of films.
MAX_FILMS, MAX_PANELS, MAX_BYTES = 8, 24, 12_000_000
PANEL_HEIGHT, COLUMNS = 192, 4


def write_sweep(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes report and tables into ``folder``; the path of the report."""
    path = folder / "report.html"
    if not summary["rows"]:
        write_atomic(path, render("sweep.html", summary=summary))
        return path
    table, protocol = sweep_table.cells(summary), sweep_table.protocol(summary)
    parts = [markdown(*table), markdown_text(protocol), *sweep_table.further_markdown(summary)]
    files = {
        "table.md": "\n\n".join(parts) + "\n",
        "table.tex": latex(*table) + "\n",
        "table.csv": sweep_table.numbers(summary),
    }
    for name, text in files.items():
        write_atomic(folder / name, text)
    page = render(
        "sweep.html",
        summary=summary,
        table=table,
        protocol=protocol,
        further=sweep_table.further_cells(summary),
        judged=sweep_table.vbench_cells(summary),
        told=next((row["vbench"] for row in summary["rows"] if row["vbench"]), {}),
        ladder=sweep_table.ladder_cells(summary),
        figures=_figures(summary),
        downloads=[(name, data_uri(text.encode(), "text/plain")) for name, text in files.items()],
        videos=_videos(folder, summary["rows"]),
    )
    write_atomic(path, page)
    return path


def _figures(summary: dict[str, Any]) -> dict[str, str]:
    """SVGs by name, of the rows in which every pair has a finite value, and what they leave out in words."""
    labelled = [(f"{number}  {row['name']}", row) for number, row in enumerate(summary["rows"], 1)]
    numbered = [
        (label, row["name"], row["protect"]["fraction_of_flops_quantized"], row["metrics"][STEP_SQNR])
        for label, row in labelled
    ]
    rows = [
        (label, name, share, bounds, metric["per_item"])
        for label, name, share, metric in numbered
        if (bounds := interval(metric)) and all(item["value"] is not None for item in metric["per_item"])
    ]
    if not rows:
        return {}
    prompts = list(dict.fromkeys(item["prompt"] for item in rows[0][-1]))
    panels = [
        (prompt, [[item["value"] for item in items if item["prompt"] == prompt] for *_, items in rows])
        for prompt in prompts[:MAX_PANELS]
    ]
    shares = [(name, share, *bounds) for _, name, share, bounds, _ in rows]
    several = len({share for _, share, *_ in shares}) > 1
    return {
        "single_steps": figures.over_sigma([(label, row["single_steps"]) for label, row in labelled]),
        "intervals": figures.intervals([(label, *bounds) for label, _, _, bounds, _ in rows], head(STEP_SQNR)),
        "pareto": figures.pareto(shares, head(STEP_SQNR)) if several else "",
        "prompts": figures.small_multiples(panels, head(STEP_SQNR)),
        "left_out": f" The first {MAX_PANELS} of {len(prompts)} prompts." if len(prompts) > MAX_PANELS else "",
    }


def _videos(folder: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, data) for the first pair of each prompt: BF16 and every configuration in one film, so in step."""
    items = rows[0]["metrics"].get("psnr", {}).get("per_item", [])
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
