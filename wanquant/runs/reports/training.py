"""What a training did, in words and pictures: the verdict against its untrained baseline, and its curves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from wanquant.runs.reports.columns import STEP_SQNR, estimate_text, head, told
from wanquant.runs.reports.figures import before_after, curves, heatmap
from wanquant.runs.reports.table import Table

#: Of a block's losses, in the figure.
PARTS = 10
LOSSES = ("loss", "flow", "output", "blocks")
#: What has a curve of its own, where it is not 0 throughout.
CURVES = (("grad_norm", "Norm of the gradients"), ("lr", "Learning rate"), ("clipped", "Beyond the range"))


def who(result: dict[str, Any]) -> tuple[str, str]:
    """What the trained model and its baseline are called."""
    return ("QAT", "PTQ baseline") if result["qat"]["quantize"] else ("fine-tuned", "BF16 as it was")


def headline(result: dict[str, Any]) -> str:
    """``QAT better than its PTQ baseline by 1.7 dB [0.3, 3.1] of single steps, SQNR``."""
    if not result["over_untrained"]:
        return "fine-tuned; whether for the better is for python eval.py to say"
    name, metric = next(iter(result["over_untrained"].items()))
    title, unit = told(name)
    ours, untrained = who(result)
    if metric["mean"] is None:
        return f"{ours} against {untrained}: {metric['verdict']} (a {title} is not finite)"
    low, high = metric["ci95"]
    bounds = "" if low is None else f"[{low:.2f}, {high:.2f}]"
    said = f"{metric['mean']:+.2f} {unit} {bounds} of {title}, over {metric['n']} pairs".replace("  ", " ")
    blocks = result["training"].get("blocks")
    nothing = "; no block got better, so none was changed" if blocks and not any(row["kept"] for row in blocks) else ""
    return f"{ours} against {untrained}: {_verdict(metric)} ({said}){nothing}"


def _verdict(metric: dict[str, Any]) -> str:
    """With the difference that would have been found four times in five, where none was."""
    told, seen = str(metric["verdict"]), metric.get("could_see")
    return f"{told} (4 in 5 times {seen:.2g} would show)" if told == "no difference found" and seen else told


def untrained_table(result: dict[str, Any]) -> Table:
    """Untrained, trained, difference and verdict of every metric that both have."""
    metrics, (ours, untrained) = result["metrics"], who(result)
    rows = []
    for name, metric in result["over_untrained"].items():
        sides = [estimate_text(metrics.get(key)) or "–" for key in (f"untrained.{name}", name)]
        rows.append([head(name), *sides, estimate_text(metric), _verdict(metric)])
    return Table(["", untrained, ours, "difference, paired", "verdict"], rows)


def training_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG)."""
    return _block_figures(result) if "blocks" in result["training"] else _step_figures(result)


def _block_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of a training block by block."""
    rows = result["training"]["blocks"]
    pairs = [(row["block"], row["before"], row["after"]) for row in rows]
    learned: list[list[float | None]] = [[None] * PARTS for _ in range(result["model"]["blocks"])]
    for row in rows:
        learned[row["block"]] = _thinned(row["losses"])
    losses = heatmap(learned, "share of the steps, tenths", "loss", log=True)
    return [
        ("Error of each block's output on samples set aside", before_after(pairs, "relative squared error")),
        ("Loss of every block, its steps from left to right", losses),
    ]


def _step_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of a training of all blocks together."""
    rows, checks = result["training"]["rows"], result["training"]["checks"]
    steps = [row["step"] for row in rows]
    known = [name for name in (*LOSSES, *dict(CURVES)) if rows and name in rows[0]]
    lines: dict[str, Sequence[float | None]] = {name: [row[name] for row in rows] for name in known}
    losses = {name: lines[name] for name in LOSSES if name in lines}
    if len(losses) == 2:  # of one part alone the loss is that part
        losses = {"loss": losses["loss"]}
    figures = [("Loss", curves(steps, losses, "loss", log=True))]
    for name, title in CURVES:
        if any(lines.get(name, ())):
            figures.append((title, curves(steps, {name: lines[name]}, title.lower(), log=name == "grad_norm")))
    looks = [row for row in rows if "drift" in row]
    if looks:
        every = looks[1]["step"] - looks[0]["step"] if len(looks) > 1 else 1
        svg = heatmap(drift_table(looks, result["model"]["blocks"]), f"every {every} steps", "octaves", log=False)
        figures.append(("How far the scales have moved", svg))
    if checks:
        over = {"trained": [row[STEP_SQNR] for row in checks], "untrained": [row["untrained"] for row in checks]}
        figures.append(("Validation", curves([row["step"] for row in checks], over, head(STEP_SQNR), log=False)))
    return figures


def drift_table(looks: Sequence[dict[str, Any]], blocks: int) -> list[list[float | None]]:
    """A row a block, a column a look; what is protected has no scales."""
    return [[look["drift"].get(f"blocks.{index}") for look in looks] for index in range(blocks)]


def _thinned(losses: list[float]) -> list[float | None]:
    """Means over tenths."""
    edges = [round(place * len(losses) / PARTS) for place in range(PARTS + 1)]
    chunks = [losses[a:b] or losses[-1:] for a, b in itertools.pairwise(edges)]
    return [sum(chunk) / len(chunk) for chunk in chunks]
