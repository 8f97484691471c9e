"""What a training will need of a device's memory and of time, from the shapes alone, and which options shrink it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wanquant.formats.registry import HiF8
from wanquant.ptq.estimate import count_videos, start_and_end
from wanquant.qat.config import AT_ONCE, QATConfig
from wanquant.qat.plan import TrainPlan
from wanquant.qat.scope import is_matrix, trains_weights
from wanquant.qat.train_config import SET_ASIDE
from wanquant.quant import plan_conversion
from wanquant.quant.convert import make_trainable_
from wanquant.quant.scheme import Scheme
from wanquant.quant.trainable import Training
from wanquant.runs.launch import processes
from wanquant.wan.experts import parts_of
from wanquant.wan.resources.empty import Given, tokens_of
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts
from wanquant.wan.resources.footprint import Kept, kept_by, once
from wanquant.wan.resources.offload import Needed
from wanquant.wan.resources.printed import in_bytes, print_estimate
from wanquant.wan.resources.probe import block_seconds, learning_seconds

#: What training adds on the device.
ADDED = ("weights", "gradients", "optimizer", "average", "activations")


@dataclass(frozen=True)
class TrainingMemory:
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


def estimate_memory(plan: TrainPlan, streams: bool = False) -> TrainingMemory:
    """``streams``: the model's weights wait beside the device."""
    qat, whole = plan.qat, plan.model.shape
    shape, tokens, text = (
        whole.config,
        tokens_of(plan.settings, whole, Given.of(plan.model.files.folder)),
        plan.settings.max_text_length,
    )
    heads, rows, passing = shape.num_attention_heads, _rows(qat), _passing(plan)
    width, kept = heads * shape.attention_head_dim, _kept(dict(shape), *_rounding(plan), plan.precision)
    activations = kept.bytes(heads, shape.ffn_dim, tokens, text) * rows
    every, block = (sum(p.numel() for p in part.parameters()) for part in (whole, whole.blocks[0]))
    copies = 2 if plan.precision == "bf16" or qat.quantize else 0  # of the weights, as they are multiplied
    if qat.scope == "blockwise":
        # The model, the block that learns, and on the host what enters it twice, what leaves it, and the text.
        host = 2 * passing * (3 * tokens + text) * width
        average = 4 * block if qat.ema else 0
        there = 4 * block if streams else 0  # the block as it was, and as inference will run it
        one = ((4 + copies) * block + there, 4 * block, 8 * block, average, activations)
        return TrainingMemory(
            0 if streams else 2 * every, *one, host, (1 if plan.scheme.packed else 2) * (shape.num_layers - 1) * block
        )
    trained = count_trained(plan)
    rounded = block if qat.recompute else every
    weights = (4 if trains_weights(qat.scope) else 2) * every + copies * rounded
    passed = shape.num_layers // len(parts_of(whole))  # by each row: of two transformers it passes through only one
    if qat.recompute:
        activations += 2 * rows * tokens * width * passed
    else:
        activations *= passed
    return TrainingMemory(2 * every, weights, 4 * trained, 8 * trained, 4 * trained if qat.ema else 0, activations)


def training_ways(plan: TrainPlan, needs: ResourceEstimate) -> dict[str, Needed]:
    """What the training itself needs, by where the weights wait: beside the device only where one block is trained at a
    time."""
    memory, on_host = estimate_memory(plan), needs.device.type == "cpu"
    beside = 0 if on_host else memory.host
    model = 2 * needs.parameters + needs.others + (needs.videos if on_host else 0)
    whole = Needed(model + memory.added(on_host), beside)
    if plan.qat.scope != "blockwise":
        return {"none": whole}
    if on_host:
        return {"none": whole, "group": whole, "disk": Needed(memory.added(False) + memory.host + needs.videos, 0)}
    card, ways = needs.vae + estimate_memory(plan, streams=True).added(False), needs.ways
    return {"none": whole} | {name: Needed(card, ways[name].host + beside) for name in ("group", "disk")}


def estimate_seconds(plan: TrainPlan) -> float:
    """By a probe of one block."""
    qat, whole = plan.qat, plan.model.shape
    shape, tokens, text = (
        dict(whole.config),
        tokens_of(plan.settings, whole, Given.of(plan.model.files.folder)),
        plan.settings.max_text_length,
    )
    how = (tokens, text, max(1, _rows(qat)), plan.device, plan.precision)
    each = qat.accumulation * learning_seconds(shape, lambda small: _prepare(small, *_rounding(plan)), *how)
    passed = len(whole.blocks) / len(parts_of(whole))
    if qat.scope != "blockwise":
        return qat.steps * passed * each * (4 / 3 if qat.recompute else 1)
    # Every sample passes through the block in BF16 and quantized, and an eighth twice more, for what is kept.
    passes = _passing(plan) * (2 + 2 / SET_ASIDE) / AT_ONCE
    plain = block_seconds(shape, None, tokens, text, AT_ONCE, plan.device)
    return len(plan.chosen) * qat.steps * each + passed * passes * plain


def count_training_videos(plan: TrainPlan) -> VideoCounts:
    """As for a quantization, with the videos of the untrained baseline; what is learned from is recorded in BF16,
    and what is measured too."""
    counts, qat, measured, calibrated = count_videos(plan), plan.qat, len(plan.pairs), len(plan.calibration)
    baselines = 1 if qat.quantize else 0
    shown = measured if plan.config.eval.videos else 0
    share = plan.config.eval.single_steps / plan.settings.steps
    looks = (1 + qat.steps // qat.check_every) * calibrated * share if qat.check_every else 0
    kept = [(len(plan.learned) * plan.settings.steps, plan.settings.num_frames)]
    kept += [(calibrated * plan.config.eval.single_steps, plan.settings.num_frames)] if looks else []
    return dataclasses.replace(
        counts,
        recorded=len(plan.learned),
        untrained=baselines * shown,
        looks=looks,
        renamed=(("generate_quantized", "generate_trained"),),
        bf16=counts.bf16 + len(plan.learned) + (calibrated if looks else 0),
        quantized=counts.quantized + baselines * shown,
        replayed=(1 + baselines) * counts.replayed,
        recorded_steps=(*counts.recorded_steps, *kept),
        decoded=counts.decoded + baselines * shown,
        held=counts.held + baselines * shown,
        beside=counts.beside or bool(baselines),
    )


def _rows(qat: QATConfig) -> int:
    """Samples that a process takes through the model together."""
    return qat.batch // (qat.accumulation * processes())


def _passing(plan: TrainPlan) -> int:
    """Samples that pass from block to block."""
    return min(plan.samples, plan.qat.samples or plan.samples)


def count_trained(plan: TrainPlan) -> int:
    """How many numbers ``wanquant.qat.scope.choose_`` would train."""
    qat, whole = plan.qat, plan.model.shape
    if qat.scope == "all":
        return sum(p.numel() for p in whole.parameters())
    if qat.scope in ("blocks", "blockwise", "norms"):
        inside = [named for index in plan.chosen for named in whole.blocks[index].named_parameters()]
        return sum(p.numel() for name, p in inside if qat.scope != "norms" or not is_matrix(name, p))
    conversion = plan_conversion(whole, plan.scheme, plan.model.protected or (), plan.config.protect.modules)
    count = 0
    for row in conversion.modules:
        if row.status == "converted" and row.block in plan.chosen:
            linear: Any = whole.get_submodule(row.name)
            size = linear.out_features, linear.in_features
            if qat.scope == "lora":
                count += qat.lora.rank * sum(size)
            else:
                count += (
                    math.prod(plan.scheme.weight_granularity.scale_shape(linear.out_features)) + plan.scheme.act_static
                )
    return count


def _rounding(plan: TrainPlan) -> tuple[Scheme | None, Training]:
    """How what is trained is rounded: not at all, or in a scheme that keeps as much for the backward pass as this one
    and takes any width, for what is measured is narrower than a block of some formats."""
    if not plan.qat.quantize:
        return None, plan.training
    weights, inputs = (HiF8() if each.block else each for each in (plan.scheme.format, plan.scheme.act_format))
    return replace(plan.scheme, format=weights, act_format=inputs), plan.training


@once
def _kept(shape: dict[str, Any], scheme: Scheme | None, training: Training, precision: str) -> Kept:
    return kept_by(shape, lambda small: _prepare(small, scheme, training), precision)


def _prepare(small: nn.Module, scheme: Scheme | None, training: Training) -> None:
    """As in training: the block's linears, whatever their inputs may be."""
    if scheme is not None:
        seen = {name: 1.0 for name, child in small.named_modules() if isinstance(child, nn.Linear)}
        make_trainable_(small, scheme, (), (), seen, training)


def shrinks(qat: QATConfig) -> str:
    """The options that would need less memory, those that cost least first."""
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


def print_estimates(plan: TrainPlan, needs: ResourceEstimate, told: str, config_yaml: str) -> None:
    """What the training needs, after what the quantization does."""
    seconds = estimate_seconds(plan)
    outside = {**start_and_end(plan.config.tracker.name), "train": seconds}
    print_estimate(needs, config_yaml, outside, told)
    streams = needs.offload != "none" and needs.device.type != "cpu"
    memory, options = estimate_memory(plan, streams), shrinks(plan.qat)
    parts = {name: getattr(memory, name) for name in ("model", *ADDED)}
    shown = ", ".join(f"{name} {in_bytes(value)}" for name, value in parts.items() if value)
    print(f"training    {in_bytes(memory.total)} on the device: {shown}")
    if memory.host:
        passing = f"{in_bytes(memory.host)} beside it, for what passes between blocks ({_passing(plan)} samples)"
        print(f"            {passing}")
    if options:
        print(f"            less with {options}")
