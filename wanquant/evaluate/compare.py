"""All that is measured on generated videos, pair by pair, under the names ``result.json`` has.

``psnr``, ``ssim``, ``latent_sqnr``                quantized against BF16
``floor_ulp.psnr``, ``floor_seed.psnr``, ...       BF16 against itself: the noise floor
``bf16.color``, ``color``, ``difference.color``    attribute accuracy: BF16, quantized, paired difference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from wanquant.evaluate import attributes, fidelity, motion
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges.flow import flow
from wanquant.evaluate.judges.perceptual import Distance, distance
from wanquant.evaluate.motion import Flow, farneback
from wanquant.evaluate.stats import Item, difference
from wanquant.runs.reports.columns import ATTRIBUTES, FIDELITY, FURTHER
from wanquant.wan.generate import Sample
from wanquant.wan.tiny import parse_caption

#: Metrics of a pair (reference, sample) that were added to those of ``fidelity``, by name.
REGISTERED: dict[str, Callable[[Sample, Sample], float]] = {}


def register_metric(name: str, measure: Callable[[Sample, Sample], float], title: str, unit: str = "") -> None:
    """Adds a metric: ``measure(reference, sample)`` of each pair joins ``metrics`` under its name, of the noise floors
    too, and the tables show it as ``title`` in ``unit``. ``ValueError`` for a name that is taken.

    Pairs are measured once: what the cache or a finished run holds under this name, or without it, stays as it is.
    """
    if name in (*FIDELITY, *FURTHER, *ATTRIBUTES):
        raise ValueError(f"there is a metric {name} already")
    REGISTERED[name] = measure
    FURTHER[name] = title, unit


@dataclass(frozen=True)
class Networks:
    """What measures with weights of its own, where they are there: the distance LPIPS, and optical flow."""

    lpips: Distance | None = None
    flow: Flow = farneback

    @classmethod
    def of(cls, config: EvalConfig, device: torch.device) -> Networks:
        return cls(distance(config.lpips, device), flow(config.flow, device))


def distances(reference: Sample, sample: Sample, scenes: bool, networks: Networks) -> dict[str, float]:
    """What is measured of a sample beside its reference; ``scenes``: both show one of ``wanquant.wan.tiny``."""
    found = fidelity.compare(reference, sample, networks.lpips)
    found |= motion.compare(reference.video, sample.video, networks.flow)
    if scenes:
        found["shape_speed"] = attributes.speed_ratio(reference.video, sample.video)
    return found | {name: measure(reference, sample) for name, measure in REGISTERED.items()}


def of_pair(sample: Sample, reference: Sample | None, scenes: bool, networks: Networks) -> dict[str, float]:
    """Every metric of one pair; ``scenes``: the prompt is a caption of ``wanquant.wan.tiny``, so that attributes can be
    measured too."""
    found = distances(reference, sample, scenes, networks) if reference is not None else {}
    if scenes:
        for prefix, side in (("bf16.", reference), ("", sample)):
            if side is not None:
                scores = attributes.score(side.video, parse_caption(side.prompt))
                found |= {prefix + name: value for name, value in scores.items()}
    return found


def measure(
    beside: Mapping[str, Sequence[tuple[Sample, Sample]]],
    scenes: bool,
    on_pair: Callable[[], None] = lambda: None,
    networks: Networks = Networks(),
) -> dict[str, list[Item]]:
    """Every metric of every pair.

    beside   by prefix: couples (reference, sample); the prefix ``""`` is BF16 beside quantized
    """
    found: dict[str, list[Item]] = {}
    for prefix, couples in beside.items():
        for reference, sample in couples:
            if prefix:
                values = distances(reference, sample, scenes, networks)
            else:
                values = of_pair(sample, reference, scenes, networks)
            for name, value in values.items():
                found.setdefault(prefix + name, []).append(Item(reference.prompt, reference.seed, value))
            on_pair()
    return with_differences(found)


def with_differences(found: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """And for what was measured on both sides the paired difference, quantized less BF16."""
    both = [name for name in found if f"bf16.{name}" in found]
    return found | {f"difference.{name}": difference(found[name], found[f"bf16.{name}"]) for name in both}
