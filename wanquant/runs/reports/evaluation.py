"""What ``evaluations`` of a result says, for the report and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanquant.runs.reports.columns import ATTRIBUTES, NOTICE_COLLAPSE, estimate_text, head, present
from wanquant.runs.reports.page import films, render
from wanquant.runs.reports.table import Table
from wanquant.runs.run import digest

#: Means in the columns, by prefix.
SIDES = (
    ("bf16.", "BF16"),
    ("", "quantized"),
    ("difference.", "difference"),
    ("floor_ulp.", "floor: noise perturbed by 1 ulp"),
    ("floor_seed.", "floor: |another seed|"),
)
#: Films of each evaluation in the report.
MAX_FILMS = 8


def vbench_table(entry: dict[str, Any]) -> Table:
    """A dimension a row, those that notice a collapse in any case; empty where VBench judged nothing."""
    metrics, told = entry["metrics"], entry["vbench"]
    if not told:
        return Table([], [])
    sides = {
        prefix: "judged" if "model" in entry["sides"] and not prefix else label
        for prefix, label in SIDES
        if any(name.startswith(f"{prefix}vbench.") for name in metrics)
    }
    rows = []
    for dimension in dict.fromkeys((*told["dimensions"], *NOTICE_COLLAPSE)):
        name = f"vbench.{dimension}"
        if name in metrics:
            cells = [estimate_text(metrics.get(prefix + name), 5) for prefix in sides]
            word = _verdict(metrics.get(f"difference.{name}"), entry["demonstration"])
            rows.append([dimension, str(metrics[name]["n"]), *cells, word])
        else:
            reason = told["not_applicable"].get(dimension, "not measured")
            rows.append([dimension, reason, *[""] * (len(sides) + 1)])
    return Table(["VBench", "videos", *sides.values(), "verdict"], rows)


def _verdict(difference: dict[str, Any] | None, demonstration: bool) -> str:
    if difference is None:
        return ""
    if demonstration:
        return "too few pairs"
    low, high = difference["ci95"]
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high:
        return "no difference found"
    return "higher" if low > 0 else "lower"


def fidelity_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [head(name), estimate_text(metrics[name]), estimate_text(metrics.get(f"floor_ulp.{name}"))]
        for name in present(metrics)
    ]
    return Table(["fidelity to BF16", "mean [95 %]", "BF16, noise perturbed by 1 ulp"], rows)


def cautions(entry: dict[str, Any]) -> list[str]:
    """What a reader has to know before believing the scores."""
    missing = [name for name in NOTICE_COLLAPSE if f"vbench.{name}" not in entry["metrics"]]
    return render("evaluation_cautions.txt", entry=entry, missing=missing).splitlines()


def evaluation_summary(key: str, entry: dict[str, Any], folder: Path) -> str:
    """What the terminal shows of one evaluation."""
    metrics = entry["metrics"]
    rows = [
        [title, estimate, f"(noise perturbed by 1 ulp: {floor})" if floor else ""]
        for title, estimate, floor in fidelity_table(metrics).rows
    ]
    rows += [[f"prompts followed: {name}", estimate_text(metrics[name]), ""] for name in ATTRIBUTES if name in metrics]
    lines, report = [*vbench_table(entry).lines(), *Table([], rows).lines()], folder / "report.html"
    return render("evaluation.txt", key=key, entry=entry, lines=lines, cautions=cautions(entry), report=report)


def sections(folder: Path, result: dict[str, Any], most_bytes: int) -> list[dict[str, Any]]:
    """For the template, an evaluation each, with no more than ``most_bytes`` of films."""
    return [
        {
            "key": key,
            "entry": entry,
            "vbench": vbench_table(entry),
            "fidelity": fidelity_table(entry["metrics"]),
            "cautions": cautions(entry),
            "films": films(_films(folder / "evaluations" / key, entry), most_bytes),
        }
        for key, entry in result.get("evaluations", {}).items()
    ]


def _films(folder: Path, entry: dict[str, Any]) -> list[tuple[str, Path]]:
    """Of the first pairs: both sides in one, or the model's own. Their names begin with the hash of a prompt, or are
    the standard's, which say it all."""
    texts = {digest(text)[:8]: text for text in entry["texts"]}
    paths = sorted((folder / "side_by_side").glob("*.mp4")) or sorted((folder / "model").glob("*.mp4"))
    found = []
    for path in paths[:MAX_FILMS]:
        hashed, _, seed = path.stem.partition("-seed")
        found.append((f"{texts[hashed]}, seed {seed}" if hashed in texts else path.stem, path))
    return found
