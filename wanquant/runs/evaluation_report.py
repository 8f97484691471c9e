"""What ``evaluations`` of a result says, for the report and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanquant.runs.reports.columns import ATTRIBUTES, FIDELITY, FURTHER, NOTICE_COLLAPSE, estimate_text, verdict_word
from wanquant.runs.run import digest

#: Means of the columns, by prefix.
SIDES = (("bf16.", "BF16"), ("", "quantized"), ("difference.", "difference"))
FLOORS = (("floor_ulp.", "floor: noise perturbed by 1 ulp"), ("floor_seed.", "floor: |another seed|"))


def vbench_table(entry: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a dimension a row, those that notice a collapse in any case."""
    metrics, told = entry["metrics"], entry["vbench"]
    if not told:
        return [], []
    alone = "model" in entry["sides"]
    prefixes = [(p, "judged" if alone and not p else label) for p, label in (*SIDES, *FLOORS) if _any(metrics, p)]
    rows = []
    for dimension in dict.fromkeys((*told["dimensions"], *NOTICE_COLLAPSE)):
        name = f"vbench.{dimension}"
        if name not in metrics:
            rows.append([dimension, told["not_applicable"].get(dimension, "not measured"), *[""] * (len(prefixes) + 1)])
            continue
        cells = [estimate_text(metrics[p + name], 5) if p + name in metrics else "" for p, _ in prefixes]
        word = verdict_word(metrics["difference." + name]) if "difference." + name in metrics else ""
        rows.append([dimension, str(metrics[name]["n"]), *cells, word])
    return ["VBench", "videos", *(label for _, label in prefixes), "verdict"], rows


def _any(metrics: dict[str, Any], prefix: str) -> bool:
    return any(name.startswith(f"{prefix}vbench.") for name in metrics)


def cautions(entry: dict[str, Any]) -> list[str]:
    """What a reader has to know before believing the scores."""
    told, texts = entry["vbench"], []
    if entry["gates_failed"]:
        texts.append(f"collapsed: {', '.join(entry['gates_failed'])}. Whatever the averages say, they do not count")
    if entry["demonstration"]:
        pairs = f"{entry['pairs']} (prompt, seed) pair" + ("s are" if entry["pairs"] > 1 else " is")
        texts.append(f"{pairs} a demonstration, compare nothing by them")
    if not told:
        return texts
    if told["foreign_weights"]:
        texts.append("the scores are meaningless: the weights are not the published ones")
    missing = [name for name in NOTICE_COLLAPSE if f"vbench.{name}" not in entry["metrics"]]
    if missing:
        texts.append(f"without {', '.join(missing)} VBench cannot tell a collapsed model; the collapse gates can")
    if told["long"]:
        texts.append(
            f"{told['long']} of {entry['pairs']} videos last 5.0 s or more and belong to VBench-Long: VBench's "
            f"published scores are of shorter ones"
        )
    return texts


def evaluation_summary(key: str, entry: dict[str, Any], folder: Path) -> str:
    """What the terminal shows of one evaluation."""
    heads, rows = vbench_table(entry)
    lines = [""]
    if rows:
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *rows)]
    for title, metric, floor in fidelity_rows(entry["metrics"]):
        beside = f"   (noise perturbed by 1 ulp: {estimate_text(floor)})" if floor else ""
        lines.append(f"{title:<28}{estimate_text(metric)}{beside}")
    for name in (name for name in ATTRIBUTES if name in entry["metrics"]):
        lines.append(f"{'prompts followed: ' + name:<28}{estimate_text(entry['metrics'][name])}")
    lines.append("gates: " + (f"FAILED {', '.join(entry['gates_failed'])}" if entry["gates_failed"] else "passed"))
    lines += [f"caution: {text}" for text in cautions(entry)]
    return "\n".join([*lines, f"evaluation {key} joined: {folder / 'report.html'}"])


def fidelity_rows(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Title, estimate, and the noise floor's."""
    return [
        (title + (f", {unit}" if unit else ""), metrics[name], metrics.get(f"floor_ulp.{name}"))
        for name, title, unit in (*FIDELITY, *FURTHER)
        if name in metrics
    ]


def _films(folder: Path, entry: dict[str, Any]) -> list[tuple[str, Path]]:
    """Of the first pairs: both sides in one, or the model's own."""
    for kind in ("side_by_side", "model"):
        paths = sorted((folder / kind).glob("*.mp4"))[:8]
        if paths:
            return [(_caption(path.stem, entry), path) for path in paths]
    return []


def _caption(stem: str, entry: dict[str, Any]) -> str:
    """Names begin with the hash of a prompt, or are the standard's, which say it all."""
    hashed, _, seed = stem.partition("-seed")
    return next((f"{text}, seed {seed}" for text in entry["texts"] if digest(text)[:8] == hashed), stem)


def sections(folder: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """For the template, an evaluation each."""
    found = []
    for key, entry in result.get("evaluations", {}).items():
        heads, rows = vbench_table(entry)
        metrics = entry["metrics"]
        found.append(
            {
                "key": key,
                "entry": entry,
                "heads": heads,
                "rows": rows,
                "fidelity": fidelity_rows(metrics),
                "attributes": [name for name in ATTRIBUTES if name in metrics],
                "cautions": cautions(entry),
                "films": _films(folder / "evaluations" / key, entry),
                "alone": "model" in entry["sides"],
                "meanings": [(d, entry["vbench"]["meanings"][d]) for d in entry["vbench"].get("dimensions", ())],
            }
        )
    return found
