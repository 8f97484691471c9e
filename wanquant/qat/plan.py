"""What a training will need of a device's memory, from the shapes alone, and which options shrink it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wanquant.ptq.protect import RULES, by_rule
from wanquant.qat.check import training_of
from wanquant.qat.config import AT_ONCE, SET_ASIDE, TrainConfig, processes
from wanquant.qat.scope import is_matrix, trains_weights
from wanquant.quant import QuantConfig, plan_conversion
from wanquant.quant.convert import make_trainable_
from wanquant.quant.scheme import parse
from wanquant.quant.select import resolve_blocks
from wanquant.quant.trainable import Training
from wanquant.wan.experts import parts_of
from wanquant.wan.load import Transformer
from wanquant.wan.resources.footprint import Kept, kept_by, once
from wanquant.wan.resources.probe import block_seconds, learning_seconds


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes on the device while it trains, by what they are for. ``model`` is in BF16 and there before; ``host`` is
    what lies beside the device; ``replaced`` what is quantized already while, where the device is the host, the file of
    the BF16 weights stays mapped into memory as a whole."""

    model: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    host: int = 0
    replaced: int = 0

    @property
    def total(self) -> int:
        return self.model + self.weights + self.gradients + self.optimizer + self.average + self.activations

    def added(self, on_host: bool) -> int:
        """By the training to what it found; ``on_host`` where the device is the host."""
        return self.total - self.model + (self.host + self.replaced if on_host else 0)


def plan_training(
    transformer: Transformer, config: TrainConfig, tokens: int, samples: int, precision: str, world: int = 1
) -> TrainingPlan:
    """``transformer`` may be on meta. ``tokens`` are those of one video, ``samples`` those of blockwise training."""
    qat, shape = config.qat, transformer.config
    kept = _kept(dict(shape), *_rounding(config), precision)
    heads, text = shape.num_attention_heads, config.model.generation.max_text_length
    width, rows = heads * shape.attention_head_dim, qat.batch // (qat.accumulation * world)
    activations = kept.bytes(heads, shape.ffn_dim, tokens, text) * rows
    every, block = (sum(p.numel() for p in part.parameters()) for part in (transformer, transformer.blocks[0]))
    copies = 2 if precision == "bf16" or qat.quantize else 0  # of the weights, as they are multiplied
    if qat.scope == "blockwise":
        # The model, the block that learns, and the stream: what enters twice, what leaves, and the text.
        host = 2 * min(samples, qat.samples or samples) * (3 * tokens + text) * width
        average = 4 * block if qat.ema else 0
        one = ((4 + copies) * block, 4 * block, 8 * block, average, activations)
        return TrainingPlan(2 * every, *one, host, (1 if config.quant.packed else 2) * (shape.num_layers - 1) * block)
    trained = count_trained(transformer, config)
    rounded = block if qat.recompute else every
    weights = (4 if trains_weights(qat.scope) else 2) * every + copies * rounded
    passed = shape.num_layers // len(parts_of(transformer))  # by each row: of two transformers only one is asked
    activations *= passed
    if qat.recompute:
        activations = activations // passed + 2 * rows * tokens * width * passed
    return TrainingPlan(2 * every, weights, 4 * trained, 8 * trained, 4 * trained if qat.ema else 0, activations)


def training_seconds(
    transformer: Transformer, config: TrainConfig, tokens: int, samples: int, device: torch.device, precision: str
) -> float:
    """By a probe of one block."""
    qat, shape, text = config.qat, dict(transformer.config), config.model.generation.max_text_length
    blocks, parts = len(transformer.blocks), len(parts_of(transformer))
    how = (tokens, text, max(1, qat.batch // (qat.accumulation * processes())), device, precision)
    each = qat.accumulation * learning_seconds(shape, lambda small: _prepare(small, *_rounding(config)), *how)
    if qat.scope != "blockwise":
        return qat.steps * blocks / parts * each * (4 / 3 if qat.recompute else 1)
    trained = len(resolve_blocks(qat.blocks, blocks)) if qat.blocks else blocks
    asked = min(samples, qat.samples or samples)
    # Every sample passes through the block in BF16 and quantized, and an eighth twice more, for what is kept.
    passes = asked * (2 + 2 / SET_ASIDE) / AT_ONCE
    plain = block_seconds(shape, None, tokens, text, AT_ONCE, device)
    return trained * qat.steps * each + blocks / parts * passes * plain


def count_trained(transformer: Transformer, config: TrainConfig) -> int:
    """How many numbers ``wanquant.qat.scope.choose_`` would train."""
    qat, blocks = config.qat, list(transformer.blocks)
    chosen = resolve_blocks(qat.blocks, len(blocks), "trained") if qat.blocks else range(len(blocks))
    if qat.scope == "all":
        return sum(p.numel() for p in transformer.parameters())
    if qat.scope in ("blocks", "blockwise"):
        return sum(p.numel() for index in chosen for p in blocks[index].parameters())
    if qat.scope == "norms":
        return sum(
            parameter.numel()
            for index in chosen
            for name, parameter in blocks[index].named_parameters()
            if not is_matrix(name, parameter)
        )
    protected = by_rule(config.protect, len(blocks), len(parts_of(transformer))) if config.protect.by in RULES else ()
    plan = plan_conversion(transformer, config.quant, protected, config.protect.modules)
    count, static = 0, config.quant.activations.static
    for row in plan.modules:
        if row.status == "converted" and row.block in chosen:
            linear = transformer.get_submodule(row.name)
            assert isinstance(linear, nn.Linear)
            shape = parse(config.quant).weight_granularity.scale_shape(linear.out_features, linear.in_features)
            count += (
                math.prod(shape) + static
                if qat.scope == "scales"
                else qat.lora.rank * (linear.in_features + linear.out_features)
            )
    return count


def _rounding(config: TrainConfig) -> tuple[QuantConfig | None, Training]:
    """How what is trained is rounded: not at all, or by this quantization."""
    return config.quant if config.qat.quantize else None, training_of(config.qat)


@once
def _kept(shape: dict[str, Any], quant: QuantConfig | None, training: Training, precision: str) -> Kept:
    return kept_by(shape, lambda small: _prepare(small, quant, training), precision)


def _prepare(small: Transformer, quant: QuantConfig | None, training: Training) -> None:
    """As in training: the block's linears, whatever their inputs may be."""
    if quant is not None:
        seen = {name: 1.0 for name, child in small.named_modules() if isinstance(child, nn.Linear)}
        make_trainable_(small, quant, (), (), seen, training)


def shrinks(config: TrainConfig) -> str:
    """The options that would need less, those that cost least first."""
    qat = config.qat
    options = []
    if qat.batch // qat.accumulation > 1:
        options.append(f"qat.accumulation={2 * qat.accumulation}")
    if qat.scope == "blockwise":
        options += ["qat.samples=96 (beside the device)"] if not 0 < qat.samples <= 96 else []
    else:
        options += [] if qat.recompute else ["qat.recompute=true"]
        options += ["qat.ema=0"] if qat.ema else []
        options += ["qat.scope=lora"] if trains_weights(qat.scope) else []
        options += ["qat.scope=blockwise"]
    return ", ".join(options)
