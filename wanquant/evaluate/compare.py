"""All that is measured on generated videos, pair by pair, under the names ``result.json`` has.

``psnr``, ``ssim``, ``latent_sqnr``                quantized against BF16
``floor_ulp.psnr``, ``floor_seed.psnr``, ...       BF16 against itself: the noise floor
``bf16.color``, ``color``, ``difference.color``    attribute accuracy: BF16, quantized, paired difference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from wanquant.evaluate import attributes, fidelity
from wanquant.evaluate.judges.perceptual import Distance
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


def distances(reference: Sample, sample: Sample, lpips: Distance | None) -> dict[str, float]:
    """What can be measured of any pair, whatever the prompt."""
    found = fidelity.compare(reference, sample, lpips)
    return found | {name: measure(reference, sample) for name, measure in REGISTERED.items()}


def of_pair(sample: Sample, reference: Sample | None, scenes: bool, lpips: Distance | None) -> dict[str, float]:
    """Every metric of one pair.

    scenes   the prompt is a caption of ``wanquant.wan.tiny``, so attributes can be measured too
    lpips    measures that distance, where it can be measured
    """
    found = distances(reference, sample, lpips) if reference is not None else {}
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
    lpips: Distance | None = None,
) -> dict[str, list[Item]]:
    """Every metric of every pair.

    beside   by prefix: couples (reference, sample); the prefix ``""`` is BF16 beside quantized
    """
    found: dict[str, list[Item]] = {}
    for prefix, couples in beside.items():
        for reference, sample in couples:
            for name, value in of_pair(sample, reference, scenes and not prefix, lpips).items():
                found.setdefault(prefix + name, []).append(Item(reference.prompt, reference.seed, value))
            on_pair()
    return with_differences(found)


def with_differences(found: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """And for what was measured on both sides the paired difference, quantized less BF16."""
    both = [name for name in found if f"bf16.{name}" in found]
    return found | {f"difference.{name}": difference(found[name], found[f"bf16.{name}"]) for name in both}
