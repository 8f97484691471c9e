"""The group ``qat`` of the config, what the training loop takes of it, and the schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from wanquant.choices import choice, mistaken
from wanquant.evaluate.prompts import PromptsConfig
from wanquant.quant.config import GRADIENTS, SCALINGS

#: What is trained, on what, by which schedule of the learning rate: ``qat.scope``, ``qat.data``, ``make_rate``.
SCOPES = ("all", "blocks", "norms", "scales", "lora", "blockwise")
SOURCES = ("trajectories", "scenes", "folder")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "bf16", "fp32")
#: Samples that pass through a block together in blockwise training, where nothing is trained.
AT_ONCE = 32
#: Step to a share of the highest learning rate, 0 to 1.
Rate = Callable[[int], float]


@dataclass
class LoraSize:
    rank: int = 8
    alpha: int = 8


@dataclass
class LossConfig:
    """Weights of the three; a weight of 0 leaves it out."""

    flow: float = 0.0
    output: float = 1.0
    blocks: float = 0.0


@dataclass
class DataConfig:
    """``prompts`` are for ``trajectories``; ``path`` for ``folder``: the list, or a folder with a ``metadata.jsonl`` or
    ``metadata.csv``; ``videos_per_scene`` for ``scenes``. ``drop`` is the share of captions that are dropped."""

    source: str = choice("trajectories", SOURCES)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    path: str = ""
    videos_per_scene: int = 2
    drop: float = 0.1


@dataclass
class QATConfig:
    """``qat=on``, ``qat=off`` and what can be changed of them."""

    name: str = "on"
    #: False fine-tunes the BF16 model and quantizes nothing.
    quantize: bool = True
    #: ``all``, ``blocks``, ``norms``, ``scales``, ``lora`` or ``blockwise``: see ``wanquant.qat.scope``.
    scope: str = choice("blockwise", SCOPES)
    #: Blocks that are trained, from either end; empty for all. For every scope but ``all``.
    blocks: list[int] = field(default_factory=list)
    lora: LoraSize = field(default_factory=LoraSize)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    #: Steps, of ``blockwise`` those of each block; of which ``bf16_steps`` first without quantization.
    steps: int = 60
    bf16_steps: int = 0
    #: Rows a step, over all processes, in so many parts.
    batch: int = 32
    accumulation: int = 1
    lr: float = 1e-3
    #: ``constant``, ``linear`` or ``cosine``, down to ``floor`` times ``lr``, after ``warmup`` steps.
    schedule: str = choice("cosine", SCHEDULES)
    warmup: int = 10
    floor: float = 0.0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    #: Of ``blockwise``: how many of the samples pass through the blocks, drawn by ``seed``; 0 for all. They are on
    #: the host, three hidden states each.
    samples: int = 0
    #: Keep only what enters each block, and compute it again for the backward pass: slower, in less memory.
    recompute: bool = False
    #: Norm to which gradients are cut; 0 leaves them.
    clip: float = 1.0
    #: Decay of the moving average of the weights, which is what is kept; 0 for none.
    ema: float = 0.0
    #: Of what enters the products of the backward pass: ``none``, ``hif8`` or ``stochastic``.
    gradients: str = choice("none", GRADIENTS)
    #: Of static inputs: ``current``, as calibrated, or ``delayed``, by the largest of the last ``window`` steps.
    scaling: str = choice("current", SCALINGS)
    window: int = 64
    #: No gradient for what falls beyond the range.
    clip_mask: bool = True
    #: Of the products: ``auto`` takes BF16 where the device multiplies it.
    precision: str = choice("auto", PRECISIONS)
    #: Steps between two states on disk, and between two looks at the validation prompts (0: only at the end).
    save_every: int = 50
    check_every: int = 0
    #: How many times its lowest value the loss may reach before the run stops.
    diverged: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class LoopConfig:
    """Of ``wanquant.qat.loop.Loop``: how long, how much at a time, and when to give up.

    batch         rows of a step, over all processes and parts
    accumulation  parts a process takes its share of them in
    clip          the norm gradients are cut to; 0 leaves them
    ema           decay of the moving average of the weights; 0 for none
    begin         the step from which on weights are averaged and losses compared: what comes before is a warm-up
    diverged      how many times its lowest value the loss may reach
    save_every    steps between two states
    """

    steps: int
    batch: int
    accumulation: int = 1
    clip: float = 1.0
    ema: float = 0.0
    begin: int = 0
    diverged: float = 10.0
    save_every: int = 50
    seed: int = 0


def loop_config(qat: QATConfig) -> LoopConfig:
    shared = {each.name: getattr(qat, each.name) for each in fields(LoopConfig) if each.name != "begin"}
    return LoopConfig(**shared, begin=qat.bf16_steps)


def make_rate(name: str, steps: int, warmup: int = 0, floor: float = 0.0, begin: int = 0) -> Rate:
    """Rises over ``warmup`` steps, then stays, or falls to ``floor`` in the last of ``steps``.

    The first ``begin`` steps have the whole rate: another phase, after which the schedule starts.
    """
    if name not in SCHEDULES:
        raise mistaken("schedule", name, SCHEDULES)

    def rate(step: int) -> float:
        if step < begin:
            return 1.0
        done = step - begin
        if done < warmup:
            return (done + 1) / warmup
        share = (done - warmup) / max(1, steps - begin - warmup - 1)
        fall = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[name]
        return floor + (1 - floor) * fall

    return rate
