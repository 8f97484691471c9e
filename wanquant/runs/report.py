"""``report.html`` of one run: one file that opens anywhere without a network, drawn from the result."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from wanquant.runs.analysis_report import analysis_html, analysis_summary
from wanquant.runs.convert_report import convert_html, convert_summary
from wanquant.runs.files import write_atomic
from wanquant.runs.reports.columns import ATTRIBUTES, FIDELITY, FURTHER, estimate_text, rows_of
from wanquant.runs.reports.evaluation import sections
from wanquant.runs.reports.figures import block_magnitudes, intervals
from wanquant.runs.reports.training import training_lines, training_section

#: Videos embedded at most, and their bytes together; the others are beside the report.
MAX_VIDEOS, MAX_VIDEO_BYTES = 10, 12_000_000
#: Share of its prompts that BF16 has to follow before a loss could be seen.
FOLLOWED = 0.5


def html_environment() -> Environment:
    loader = PackageLoader("wanquant.runs")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["estimate"] = estimate_text
    return environment


def write_report(folder: Path, result: dict[str, Any]) -> Path:
    """Draws the report of ``result`` into ``folder``, with the pictures and videos found there."""
    environment = html_environment()
    path = folder / "report.html"
    if result["mode"] == "analyze":
        write_atomic(path, analysis_html(environment, folder, result))
        return path
    if result["mode"] == "convert":
        write_atomic(path, convert_html(environment, result))
        return path
    evaluations = [_with_films(section) for section in sections(folder, result)]
    if result["mode"] == "evaluate":
        template = environment.get_template("evaluation.html.j2")
        settings = json.dumps({key: result[key] for key in ("model", "generation", "provenance")}, indent=2)
        write_atomic(path, template.render(result=result, evaluations=evaluations, settings=settings))
        return path
    metrics = result["metrics"]
    rows, further = (_fidelity_rows(result, columns) for columns in (FIDELITY, _further(metrics)))
    sqnr = [(label, m[0]["mean"], *m[0]["ci95"]) for label, m in rows if None not in (m[0]["mean"], *m[0]["ci95"])]
    videos = sorted((folder / "videos" / "side_by_side").glob("*.mp4"))[:MAX_VIDEOS]
    while sum(path.stat().st_size for path in videos) > MAX_VIDEO_BYTES:
        videos.pop()
    sheet = folder / "figures" / "contact_sheet.png"
    html = environment.get_template("report.html.j2").render(
        result=result,
        fidelity_rows=rows,
        fidelity_columns=[(title, unit) for _, title, unit in FIDELITY],
        further_rows=further,
        further_columns=[(title, unit) for _, title, unit in _further(metrics)],
        evaluations=evaluations,
        training=training_section(result) if "over_untrained" in result else None,
        attributes=[name for name in ATTRIBUTES if name in metrics],
        failed=failed_gates(result),
        cautions=cautions(result),
        magnitudes=block_magnitudes(result["calibration"]["block_absmax"], result["protect"]["blocks"]),
        intervals=intervals(sqnr, "latent SQNR, dB") if sqnr else "",
        videos=[(path.stem, data_uri(path, "video/mp4")) for path in videos],
        more_videos=len(metrics["psnr"]["per_item"]) - len(videos),
        sheet=data_uri(sheet, "image/png") if sheet.is_file() else None,
        settings=json.dumps({key: result[key] for key in ("quant", "protect", "generation", "provenance")}, indent=2),
    )
    write_atomic(path, html)
    return path


def _fidelity_rows(result: dict[str, Any], columns: tuple[tuple[str, str, str], ...]) -> list[tuple[str, list[Any]]]:
    """The run's own and the noise floors'."""
    metrics = result["metrics"]
    return [
        (label + _pairs_if_other(metrics, prefix), [metrics[prefix + key] for key, _, _ in columns])
        for prefix, label in rows_of(result)
        if prefix + FIDELITY[0][0] in metrics
    ]


def _further(metrics: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    return tuple(column for column in FURTHER if column[0] in metrics)


def _with_films(section: dict[str, Any]) -> dict[str, Any]:
    """As many as the report can hold, as data."""
    films, size = [], 0
    for caption, path in section["films"]:
        size += path.stat().st_size
        if size < MAX_VIDEO_BYTES / 2:
            films.append((caption, data_uri(path, "video/mp4")))
    return {**section, "films": films}


def summary(result: dict[str, Any], folder: Path) -> str:
    """What the terminal shows when a run has ended: counts, table, gates, and where the report is."""
    if result["mode"] == "analyze":
        return analysis_summary(result, folder)
    if result["mode"] == "convert":
        return convert_summary(result, folder)
    metrics, counts, attention = result["metrics"], result["conversion"], result["attention"]
    lines = [
        "",
        f"{result['quant']['name']} on {result['model']['name']}, protect {result['protect']['name']}: blocks "
        f"{{{', '.join(map(str, result['protect']['blocks']))}}} of {result['model']['blocks']} protected",
        ", ".join(f"{counts[status]} linears {status}" for status in counts)
        + f"; {100 * result['protect']['fraction_of_flops_quantized']:.1f} % of their FLOPs quantized"
        + (f"; {attention['converted']} attentions quantized" if attention["converted"] else ""),
        "",
        f"{'mean [95 % interval]':<28}"
        + "".join(f"{title + (', ' + unit if unit else ''):<26}" for _, title, unit in FIDELITY),
    ]
    for prefix, label in rows_of(result):
        if prefix + FIDELITY[0][0] in metrics:
            row = "".join(f"{estimate_text(metrics[prefix + key]):<26}" for key, _, _ in FIDELITY)
            lines.append(f"{label:<28}{row}{_pairs_if_other(metrics, prefix)}")
    if "attributes" in metrics:
        lines += ["", f"{'prompts followed, share':<28}{'BF16':<26}{'quantized':<26}{'difference':<26}"]
        for name in ATTRIBUTES:
            values = (estimate_text(metrics[prefix + name]) for prefix in ("bf16.", "", "difference."))
            label = "mean of the four" if name == "attributes" else name
            lines.append(f"{label:<28}" + "".join(f"{value:<26}" for value in values))
    if "over_untrained" in result:
        lines += training_lines(result)
    failed = failed_gates(result)
    overflow = result["overflow"]
    if overflow["elements"]:
        lines += [
            "",
            f"overflow: {overflow['elements']:,} elements in {len(overflow['modules'])} modules left the range",
        ]
    lines += ["", "gates: " + (f"FAILED {', '.join(failed)}" if failed else f"all {len(result['gates'])} passed")]
    lines += [f"caution: {text}" for text in cautions(result)]
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])


def cautions(result: dict[str, Any]) -> list[str]:
    """What a reader has to know before believing the numbers."""
    metrics, texts = result["metrics"], []
    if result["demonstration"]:
        texts.append(f"{metrics['psnr']['n']} (prompt, seed) pairs are a demonstration, compare nothing by them")
    followed = metrics.get("bf16.attributes", {}).get("mean")
    if followed is not None and followed < FOLLOWED:
        texts.append(
            f"BF16 itself follows its prompts to {100 * followed:.0f} % only, so this run cannot show what is lost"
        )
    return texts


def _pairs_if_other(metrics: dict[str, Any], prefix: str) -> str:
    """How many pairs stand behind a row of the table, if not as many as behind the first."""
    count = metrics[prefix + FIDELITY[0][0]]["n"]
    return "" if count == metrics[FIDELITY[0][0]]["n"] else f" ({count} pairs)"


def failed_gates(result: dict[str, Any]) -> list[str]:
    return [name for name, gate in result["gates"].items() if gate["verdict"] == "fail"]


def data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
