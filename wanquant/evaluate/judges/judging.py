"""VBench's scores of all sides of an evaluation, their paired differences, and what has to be said with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate.compare import with_differences
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges import vbench
from wanquant.evaluate.prompts import following, official_prompts
from wanquant.evaluate.stats import Item, difference
from wanquant.runs.cache import Cache
from wanquant.runs.progress import progress
from wanquant.runs.signature import installed
from wanquant.wan.cached import Pair

Scores = dict[str, list[Item]]
#: What scores share that stand beside each other.
SAME = ("version", "foreign_weights", "reader", "device")


def judge(
    files: Mapping[str, Mapping[Pair, Path]],
    config: EvalConfig,
    device: torch.device,
    cache: Cache,
    sums: dict[str, str],
    official: bool,
) -> tuple[Scores, dict[str, Any]]:
    """``files`` are the videos by prefix: of the judged model it is empty, of BF16 ``bf16.``, of BF16 with its noise
    perturbed ``floor_ulp.``. ``sums`` are from ``vbench.prepare``."""
    if not config.dimensions:
        return {}, {}
    clips = _clips(files)
    scores: Scores = {}
    nothing: dict[str, str] = {}
    for dimension in config.dimensions:
        wanted = set(official_prompts()[dimension]) if official else None
        asked = [clip for (prompt, _), clip in clips[""].items() if wanted is None or prompt in wanted]
        reasons = {(clip.prompt, clip.seed): vbench.why_not(dimension, clip) for clip in asked}
        pairs = [pair for pair, reason in reasons.items() if not reason]
        if not pairs:
            nothing[dimension] = next(iter(reasons.values()), "none of its prompts")
            continue
        for prefix, found in clips.items():
            judged = [found[pair] for pair in pairs]
            values = vbench.score(dimension, judged, device, cache, sums, official, prefix.rstrip("."))
            scores[f"{prefix}vbench.{dimension}"] = [Item(*pair, v) for pair, v in zip(pairs, values, strict=True)]
    if not scores:
        raise ValueError("; ".join(f"{dimension}: {reason}" for dimension, reason in nothing.items()))
    return _with_floors(with_differences(scores)), _told(config, list(clips[""].values()), nothing, sums, device)


def _clips(files: Mapping[str, Mapping[Pair, Path]]) -> dict[str, dict[Pair, vbench.Clip]]:
    clips: dict[str, dict[Pair, vbench.Clip]] = {}
    with progress("look at videos", sum(map(len, files.values())), "video") as tick:
        for prefix, found in files.items():
            clips[prefix] = {}
            for pair, path in found.items():
                clips[prefix][pair] = vbench.clip_of(path, *pair)
                tick()
    return clips


def _told(
    config: EvalConfig,
    clips: Sequence[vbench.Clip],
    nothing: dict[str, str],
    sums: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """Under ``vbench`` in the entry: ``nothing`` are the dimensions without a score, and why."""
    return {
        "version": installed("vbench"),
        "dimensions": list(config.dimensions),
        "meanings": {name: vbench.DIMENSIONS[name].meaning for name in config.dimensions},
        "not_applicable": nothing,
        "weights": sums,
        "foreign_weights": config.foreign_weights,
        "reader": vbench.reader(),
        "device": device.type,
        "long": sum(clip.long for clip in clips),
        "seconds": [min(clip.seconds for clip in clips), max(clip.seconds for clip in clips)],
    }


def _with_floors(scores: Scores) -> Scores:
    """The noise floors: by what BF16 with perturbed noise differs from BF16, and by how much another seed of it,
    whichever way: from seed to seed the ways cancel."""
    found = {name: items for name, items in scores.items() if not name.startswith("floor_")}
    for name, items in scores.items():
        if name.startswith("floor_ulp."):
            found[name] = difference(items, scores[name.replace("floor_ulp.", "bf16.")])
        if name.startswith("bf16."):
            moved = _to_other_seeds(items)
            found |= {name.replace("bf16.", "floor_seed."): moved} if moved else {}
    return found


def _to_other_seeds(items: list[Item]) -> list[Item]:
    values = {(item.prompt, item.seed): item.value for item in items}
    after = following(list(dict.fromkeys(item.seed for item in items)))
    others = [(item, values.get((item.prompt, after.get(item.seed, -1)))) for item in items]
    return [Item(item.prompt, item.seed, abs(other - item.value)) for item, other in others if other is not None]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An evaluation joined to an earlier one of the same pairs. Scores made otherwise (by other weights, another
    version, device or reader) do not mix: the new ones stand alone."""
    if old.get("prompt_hash") != new["prompt_hash"]:
        return new
    theirs, ours = old["vbench"], new["vbench"]
    weights = {**theirs.get("weights", {}), **ours.get("weights", {})}
    both = bool(theirs and ours)
    fits = not both or (all(theirs[key] == ours[key] for key in SAME) and theirs["weights"].items() <= weights.items())
    metrics = {name: metric for name, metric in old["metrics"].items() if fits or "vbench." not in name}
    told = ours or theirs
    if both and fits:
        told = {
            **ours,
            "weights": weights,
            "dimensions": list(dict.fromkeys(theirs["dimensions"] + ours["dimensions"])),
        }
        told |= {key: {**theirs[key], **ours[key]} for key in ("meanings", "not_applicable")}
    return {**new, "metrics": {**metrics, **new["metrics"]}, "vbench": told}
