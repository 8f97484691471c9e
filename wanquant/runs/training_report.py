"""What a training did, in words and pictures: the verdict against its untrained baseline, and its curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from wanquant.runs.reports.columns import ATTRIBUTES, FIDELITY, FURTHER, estimate_text
from wanquant.runs.reports.figures import before_after, curves, heatmap

#: Of a block's losses, in the figure.
PARTS = 10
TITLES = {"step_sqnr": ("single steps, SQNR", "dB"), **dict.fromkeys(ATTRIBUTES, ("prompts followed", "share"))}


def _titled(name: str) -> tuple[str, str]:
    """Title and unit of a metric."""
    return {**{key: (title, unit) for key, title, unit in (*FIDELITY, *FURTHER)}, **TITLES}[name]


def who(result: dict[str, Any]) -> tuple[str, str]:
    """What the trained model and its baseline are called."""
    return ("QAT", "PTQ baseline") if result["qat"]["quantize"] else ("fine-tuned", "BF16 as it was")


def headline(result: dict[str, Any]) -> str:
    """``QAT better than its PTQ baseline by 1.7 dB [0.3, 3.1] of latent SQNR``."""
    if not result["over_untrained"]:
        return "fine-tuned; whether for the better is for python eval.py to say"
    name, metric = next(iter(result["over_untrained"].items()))
    title, unit = _titled(name)
    ours, untrained = who(result)
    if metric["mean"] is None:
        return f"{ours} against {untrained}: {metric['verdict']} (a {title} is not finite)"
    said = f"{metric['mean']:+.2f} {unit} {_interval(metric)} of {title}, over {metric['n']} pairs".replace("  ", " ")
    return f"{ours} against {untrained}: {metric['verdict']} ({said})"


def _interval(metric: dict[str, Any]) -> str:
    low, high = metric["ci95"]
    return "" if low is None else f"[{low:.2f}, {high:.2f}]"


def untrained_rows(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Title, untrained, trained, difference, verdict of every metric that both have."""
    metrics, rows = result["metrics"], []
    for name, metric in result["over_untrained"].items():
        title, unit = _titled(name)
        sides = (estimate_text(metrics[key]) if key in metrics else "–" for key in (f"untrained.{name}", name))
        rows.append((f"{title}, {unit}" if unit else title, *sides, estimate_text(metric), metric["verdict"]))
    return rows


def training_lines(result: dict[str, Any]) -> list[str]:
    """For the terminal."""
    ours, untrained = who(result)
    lines = [f"{'':<24}{untrained:<26}{ours:<26}{'difference, paired':<26}verdict"]
    lines += [f"{title:<24}{a:<26}{b:<26}{d:<26}{word}" for title, a, b, d, word in untrained_rows(result)]
    return ["", *lines, "", headline(result)]


def training_section(result: dict[str, Any]) -> dict[str, Any]:
    """For the report."""
    ours, untrained = who(result)
    training, names = result["training"], ("before", "after")
    section: dict[str, Any] = {"headline": headline(result), "rows": untrained_rows(result), "names": (untrained, ours)}
    section["memory"] = {name: size / 1e9 for name, size in training["memory"].items()}
    if "blocks" in training:
        rows = training["blocks"]
        section["kept"] = sum(row["kept"] for row in rows)
        section["trained"] = len(rows)
        pairs = [(row["block"], *(row[name] for name in names)) for row in rows]
        learned: list[list[float | None]] = [[None] * PARTS for _ in range(result["model"]["blocks"])]
        for row in rows:
            learned[row["block"]] = _thinned(row["losses"])
        section["figures"] = [
            ("Error of each block's output on samples set aside", before_after(pairs, "relative squared error")),
            (
                "Loss of every block, its steps from left to right",
                heatmap(learned, "share of the steps, tenths", "loss", True),
            ),
        ]
        return section
    rows = training["rows"]
    steps = [row["step"] for row in rows]
    lines: dict[str, Sequence[float | None]] = {
        name: [row[name] for row in rows]
        for name in ("loss", "flow", "output", "blocks", "grad_norm", "lr", "clipped")
        if rows and name in rows[0]
    }
    losses: dict[str, Sequence[float | None]] = {
        name: lines.pop(name) for name in ("loss", "flow", "output", "blocks") if name in lines
    }
    if len(losses) == 2:  # of one part alone the loss is that part
        losses.pop(next(name for name in losses if name != "loss"))
    section["figures"] = [("Loss", curves(steps, losses, "loss", log=True))]
    for name, title in (
        ("grad_norm", "Norm of the gradients"),
        ("lr", "Learning rate"),
        ("clipped", "Beyond the range"),
    ):
        if name in lines and any(lines[name]):
            section["figures"].append((title, curves(steps, {name: lines[name]}, title.lower(), name == "grad_norm")))
    looks = [row for row in rows if "drift" in row]
    if looks:
        table = drift_table(looks, result["model"]["blocks"])
        section["figures"].append(
            ("How far the scales have moved", heatmap(table, f"every {_every(looks)} steps", "octaves", False))
        )
    checks = training["checks"]
    if checks:
        over = {"trained": [row["latent_sqnr"] for row in checks], "untrained": [row["untrained"] for row in checks]}
        section["figures"].append(
            ("Validation", curves([row["step"] for row in checks], over, "latent SQNR, dB", False))
        )
    return section


def drift_table(looks: Sequence[dict[str, Any]], blocks: int) -> list[list[float | None]]:
    """A row a block, a column a look; what is protected has no scales."""
    return [[look["drift"].get(f"blocks.{index}") for look in looks] for index in range(blocks)]


def _every(looks: list[dict[str, Any]]) -> int:
    return looks[1]["step"] - looks[0]["step"] if len(looks) > 1 else 1


def _thinned(losses: list[float]) -> list[float | None]:
    """Means over tenths."""
    edges = [round(place * len(losses) / PARTS) for place in range(PARTS + 1)]
    chunks = [losses[a:b] or losses[-1:] for a, b in itertools.pairwise(edges)]
    return [sum(chunk) / len(chunk) for chunk in chunks]
