"""What generating the videos of an evaluation needs of memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wanquant.evaluate.evaluation import Side
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse
from wanquant.wan.checkpoints.checkpoint import config_of, quantization_of
from wanquant.wan.load import shape_of, transformers_of
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts


def plan_of(side: Side, videos: int, device: torch.device) -> ResourceEstimate:
    """Of generating so many, kept as files."""
    quant, names, first = QuantConfig(format="bf16"), list[str](), 0
    for part in transformers_of(side.source).values():
        described = quantization_of(part)
        if described is not None:
            quant = config_of(described)
            for parts in (name.split(".") for name in described["modules"]):
                names.append(".".join([parts[0], str(first + int(parts[1])), *parts[2:]]))
        first += len(shape_of(part).blocks)
    counts = VideoCounts(0, videos, videos) if names else VideoCounts(videos, 0, videos)
    settings, rows = side.model.generation, min(side.model.batch, videos)
    return ResourceEstimate(side.source, parse(quant), (), (), settings, counts, rows, device, names or None)


def needed_by(sides: Sequence[Side], videos: int, device: torch.device) -> dict[str, Any]:
    """To generate them, one side after the other; what judges need is not in it."""
    plans = [plan_of(side, videos, device) for side in sides]
    return {
        "bytes": max(plan.added for plan in plans),
        "seconds": sum(plan.seconds for plan in plans),
        "guess": any(plan.guess for plan in plans),
    }
