"""``report.html`` of one run, drawn from its result, and its summary for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wanquant.runs.files import write_atomic
from wanquant.runs.reports.analysis import analysis_pictures, stand_out_table
from wanquant.runs.reports.columns import (
    ATTRIBUTES,
    DRIFT,
    FLOORS,
    FURTHER,
    STEP_SQNR,
    estimate_text,
    fidelity,
    head,
    interval,
)
from wanquant.runs.reports.evaluation import sections
from wanquant.runs.reports.figures import block_magnitudes, intervals, over_sigma
from wanquant.runs.reports.page import data_uri, films, render
from wanquant.runs.reports.table import Table
from wanquant.runs.reports.training import headline, training_figures, untrained_table

#: Videos embedded at most, and their bytes together; the others are beside the report.
MAX_VIDEOS, MAX_VIDEO_BYTES = 10, 12_000_000


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Draws the report of ``result`` into ``folder``, with the pictures and videos found there."""
    name, words = _words(result)
    path = folder / "report.html"
    write_atomic(path, render(f"{name}.html", result=result, **words, **_pictures(folder, result)))
    return path


def summary(result: dict[str, Any], folder: Path) -> str:
    """What the terminal shows when a run has ended: counts, table, gates, and where the report is."""
    name, words = _words(result)
    return render(f"{name}.txt", result=result, report=folder / "report.html", **words)


def _words(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of the templates, and what both the page and the terminal show."""
    if result["mode"] == "analyze":
        return "analysis", {"stand_out": stand_out_table(result)}
    if result["mode"] == "convert":
        return "convert", {"table": convert_table(result)}
    if result["mode"] == "evaluate":
        return "evaluation", {}
    trained = "over_untrained" in result
    return "report", {
        "fidelity": fidelity_table(result, fidelity(result["metrics"])),
        "attributes": attributes_table(result["metrics"]),
        "training": {"headline": headline(result), "table": untrained_table(result)} if trained else None,
        "failed": [name for name, gate in result["gates"].items() if gate["verdict"] == "fail"],
        "cautions": render("cautions.txt", result=result).splitlines(),
    }


def _pictures(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What only the page shows: figures and films, and tables beside them."""
    if result["mode"] == "analyze":
        return analysis_pictures(folder, result)
    if result["mode"] == "convert":
        return {}
    evaluations = sections(folder, result, MAX_VIDEO_BYTES // 2)
    if result["mode"] == "evaluate":
        return {"evaluations": evaluations}
    metrics = result["metrics"]
    drift = [
        (label, *bounds)
        for prefix, label in _sides(result)
        if prefix + DRIFT in metrics and (bounds := interval(metrics[prefix + DRIFT]))
    ]
    videos = sorted((folder / "videos" / "side_by_side").glob("*.mp4"))[:MAX_VIDEOS]
    sheet = folder / "figures" / "contact_sheet.png"
    return {
        "evaluations": evaluations,
        "further": fidelity_table(result, [name for name in FURTHER if name in metrics]),
        "training_figures": training_figures(result) if "over_untrained" in result else [],
        "magnitudes": block_magnitudes(result["calibration"]["block_absmax"], result["protect"]["blocks"]),
        "single_steps": over_sigma([(f"{steps['frames']} frames", steps) for steps in result["single_steps"].values()]),
        "intervals": intervals(drift, head(DRIFT)) if drift else "",
        "videos": films(((path.stem, path) for path in videos), MAX_VIDEO_BYTES),
        "sheet": data_uri(sheet, "image/png") if sheet.is_file() else None,
    }


def _sides(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Prefixes and labels of the rows of a run's table: its own, those of the untrained baseline, which only a training
    has, and of the noise floors; with the count of pairs where it is not that of the first row."""
    sides = list(FLOORS)
    if "over_untrained" in result:
        labels = ("trained", "not trained") if result["qat"]["quantize"] else ("fine-tuned", "BF16 as it was")
        sides[:1] = [("", labels[0]), ("untrained.", labels[1])]
    metrics = result["metrics"]
    counts = {prefix: metrics.get(prefix + DRIFT, metrics.get(prefix + STEP_SQNR, {})).get("n") for prefix, _ in sides}
    return [
        (prefix, label if counts[prefix] == counts[""] else f"{label} ({counts[prefix]} pairs)")
        for prefix, label in sides
        if counts[prefix] is not None
    ]


def fidelity_table(result: dict[str, Any], names: Iterable[str]) -> Table:
    """The run's own and the noise floors'."""
    names = list(names)
    rows = [
        [label, *(estimate_text(result["metrics"].get(prefix + name)) for name in names)]
        for prefix, label in _sides(result)
    ]
    return Table(["mean [95 % interval]", *map(head, names)], rows)


def attributes_table(metrics: dict[str, Any]) -> Table:
    """How prompts are followed; without rows where that was not measured."""
    rows = [
        [
            "mean of the four" if name == "attributes" else name,
            *(estimate_text(metrics[prefix + name]) for prefix in ("bf16.", "", "difference.")),
        ]
        for name in ATTRIBUTES
        if name in metrics
    ]
    return Table(["prompts followed, share", "BF16", "quantized", "difference"], rows)


def convert_table(result: dict[str, Any]) -> Table:
    """How the predictions of a conversion fared."""
    told, memory = result["convert"], result["memory"]
    lines = [
        ("weights written, GB", told["planned_bytes"] / 1e9, told["written_bytes"] / 1e9),
        ("peak memory, GB", memory["planned_bytes"] / 1e9, memory["peak_bytes"] / 1e9),
        ("time, s", told["planned_seconds"], result["timings"]["convert"]),
    ]
    rows = [[what, f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}"] for what, a, b in lines]
    return Table(["", "predicted", "measured", "ratio"], rows)
