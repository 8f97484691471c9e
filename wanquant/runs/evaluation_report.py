"""What ``evaluations`` of a result says, for the report and the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanquant.runs.estimates import estimate_text, verdict_word

#: VBench's dimensions that notice a collapse: consistency and smoothness cannot, since a frozen grey video is perfectly
#: smooth. Where means are shown these are shown, be it that they were not measured.
NOTICE_COLLAPSE = ("imaging_quality", "dynamic_degree", "overall_consistency")
#: Beyond latent SQNR, PSNR and SSIM: how the error looks.
FURTHER = (
    ("error_flicker", "error flicker", ""),
    ("motion_energy", "motion energy", "dB"),
    ("color_mean", "colour mean", "levels"),
    ("color_spread", "colour spread", "levels"),
    ("color_histogram", "colour histogram", "levels"),
    ("lpips", "LPIPS", ""),
)
#: Means of the columns, by prefix.
SIDES = (("bf16.", "BF16"), ("", "quantized"), ("difference.", "difference"))
FLOORS = (("floor_ulp.", "floor: noise moved by 1 ulp"), ("floor_seed.", "floor: another seed"))


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
    if entry["demonstration"]:
        texts.append(f"{entry['pairs']} (prompt, seed) pairs are a demonstration, compare nothing by them")
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
    shown = [(title, unit, entry["metrics"][name]) for name, title, unit in _fidelity() if name in entry["metrics"]]
    lines += [f"{title + (', ' + unit if unit else ''):<28}{estimate_text(metric)}" for title, unit, metric in shown]
    failed = [name for name, gate in entry["gates"].items() if gate["verdict"] == "fail"]
    if entry["gates"]:
        lines.append("gates: " + (f"FAILED {', '.join(failed)}" if failed else f"all {len(entry['gates'])} passed"))
    lines += [f"caution: {text}" for text in cautions(entry)]
    return "\n".join([*lines, f"evaluation {key} joined: {folder / 'report.html'}"])


def _fidelity() -> tuple[tuple[str, str, str], ...]:
    return (("latent_sqnr", "latent SQNR", "dB"), ("psnr", "PSNR", "dB"), ("ssim", "SSIM", ""), *FURTHER)


def sections(folder: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """For the template, an evaluation each."""
    found = []
    for key, entry in result.get("evaluations", {}).items():
        heads, rows = vbench_table(entry)
        metrics = entry["metrics"]
        shown = [(title, unit, metrics[name]) for name, title, unit in _fidelity() if name in metrics]
        found.append(
            {
                "key": key,
                "entry": entry,
                "heads": heads,
                "rows": rows,
                "fidelity": shown,
                "attributes": [
                    name for name in ("color", "shape", "direction", "background", "attributes") if name in metrics
                ],
                "cautions": cautions(entry),
                "films": sorted((folder / "evaluations" / key / "side_by_side").glob("*.mp4")),
                "meanings": [(d, entry["vbench"]["meanings"][d]) for d in entry["vbench"].get("dimensions", ())],
            }
        )
    return found
