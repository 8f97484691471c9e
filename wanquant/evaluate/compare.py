"""All that is measured on generated videos, pair by pair, under the names ``result.json`` has.

``psnr``, ``ssim``, ``latent_sqnr``                quantized against BF16
``floor_ulp.psnr``, ``floor_seed.psnr``, ...       BF16 against itself: the noise floor
``bf16.color``, ``color``, ``difference.color``    attribute accuracy: BF16, quantized, paired difference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from wanquant.evaluate import attributes, fidelity
from wanquant.evaluate.stats import Item, difference
from wanquant.wan.generate import Sample
from wanquant.wan.tiny import parse_caption


def measure(
    beside: Mapping[str, Sequence[tuple[Sample, Sample]]],
    scenes: bool,
    on_pair: Callable[[], None] = lambda: None,
) -> dict[str, list[Item]]:
    """Every metric of every pair.

    beside   by prefix: couples (reference, sample); the prefix ``""`` is BF16 beside quantized
    scenes   the prompts are captions of ``wanquant.wan.tiny``, so attributes can be measured too
    """
    found: dict[str, list[Item]] = {}

    def add(name: str, sample: Sample, value: float) -> None:
        found.setdefault(name, []).append(Item(sample.prompt, sample.seed, value))

    for prefix, couples in beside.items():
        for reference, sample in couples:
            for name, value in fidelity.compare(reference, sample).items():
                add(prefix + name, reference, value)
            on_pair()
    if scenes:
        for reference, sample in beside[""]:
            for prefix, side in (("bf16.", reference), ("", sample)):
                for name, value in attributes.score(side.video, parse_caption(side.prompt)).items():
                    add(prefix + name, side, value)
        for name in (*attributes.ATTRIBUTES, "attributes"):
            found["difference." + name] = difference(found[name], found["bf16." + name])
    return found
