"""A training's config, resolved once, as ``wanquant.ptq.plan`` does it; and what of it counts."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from wanquant.choices import check_choices
from wanquant.evaluate.prompts import pairs, settled
from wanquant.ptq.plan import PTQPlan, SourceModel, check_captions, resolve
from wanquant.qat.config import SET_ASIDE, LoraSize, LossConfig, QATConfig, TrainConfig, processes
from wanquant.qat.data import captions_of, check_data, contents
from wanquant.qat.loss import check_loss
from wanquant.qat.scope import trains_weights
from wanquant.quant.config import QuantConfig
from wanquant.quant.select import resolve_blocks
from wanquant.quant.trainable import Training, check_trainable
from wanquant.runs.signature import installed
from wanquant.wan.cached import Pair
from wanquant.wan.device import pick_device
from wanquant.wan.products import multiplies_bf16

#: Ranges of numbers in the config, from and to.
RANGES = {"lr": (0, 10), "floor": (0, 1), "ema": (0, 1), "diverged": (1, 1e9), "weight_decay": (0, 10)}


@dataclass(frozen=True)
class TrainPlan(PTQPlan):
    """
    learned   the (prompt, seed) pairs whose BF16 trajectories are learned from, if those are the data
    training  how each quantized linear is trained
    chosen    the blocks that the config lets be trained, numbered through: all unless ``qat.blocks`` names some
    """

    config: TrainConfig
    learned: tuple[Pair, ...]
    training: Training
    chosen: tuple[int, ...]

    @property
    def qat(self) -> QATConfig:
        return self.config.qat

    @property
    def samples(self) -> int:
        """Recorded denoising steps that are learned from."""
        return len(self.learned) * self.settings.steps * self.settings.branches

    @property
    def precision(self) -> str:
        """Of the products: ``bf16`` or ``fp32``."""
        if self.qat.precision != "auto":
            return self.qat.precision
        return "bf16" if multiplies_bf16(self.device) else "fp32"

    def counted(self, protected: tuple[int, ...] | None) -> dict[str, Any]:
        return {**super().counted(protected), **self.counted_training()}

    def counted_training(self) -> dict[str, Any]:
        """All of the training that can change a number, to be signed; data by what they are, wherever they lie."""
        qat = self.qat
        lora = qat.lora if qat.scope == "lora" else LoraSize()
        window = qat.window if qat.scaling == "delayed" else QATConfig().window
        found = dataclasses.asdict(dataclasses.replace(qat, lora=lora, window=window))
        del found["name"], found["save_every"]
        return {
            "qat": {**found, "data": contents(qat.data)},
            "world": processes(),
            "libraries": {name: installed(name) for name in ("accelerate", "peft")},
        }


def resolve_train(config: TrainConfig) -> TrainPlan:
    """``ValueError`` names the key at fault and what it may be. Without quantization the model stays BF16."""
    check_choices(config)
    data = dataclasses.replace(config.qat.data, prompts=settled(config.qat.data.prompts))
    config = dataclasses.replace(
        config,
        quant=config.quant if config.qat.quantize else QuantConfig(name="bf16", format="bf16"),
        model=dataclasses.replace(config.model, device=_own_card(config.model.device)),
        qat=dataclasses.replace(config.qat, data=data),
    )
    learned = pairs(data.prompts, "qat.data.prompts") if data.source == "trajectories" else []
    if config.model.language == "scenes":
        check_captions(learned)
    plan = resolve(config)
    _check(config, plan)
    blocks = resolve_blocks(config.qat.blocks or range(plan.model.blocks), plan.model.blocks, "trained")
    return TrainPlan(**vars(plan), learned=tuple(learned), training=training_of(config.qat), chosen=blocks)


def _own_card(device: str) -> str:
    """Of several processes each has the card that its launcher gave it."""
    kind = pick_device(device).type
    return device if processes() == 1 or kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def training_of(qat: QATConfig) -> Training:
    """How each quantized linear is trained."""
    return Training(
        weights=trains_weights(qat.scope),
        clip_mask=qat.clip_mask,
        learn_scales=qat.scope == "scales",
        gradients=qat.gradients,
        scaling=qat.scaling,
        window=qat.window,
    )


def _check(config: TrainConfig, plan: PTQPlan) -> None:
    qat, scheme = config.qat, plan.scheme
    if config.mode != "quantize":
        raise ValueError(f"mode={config.mode}: train.py has no other than quantize")
    _check_ranges(qat)
    _check_scope(qat, plan.model)
    check_data(qat.data, config.model.language)
    check_loss(qat.loss, qat.data.source)
    if qat.scope == "blockwise":
        _check_blockwise(qat)
    _check_prompts(qat, plan)
    if not qat.quantize:
        if qat.scope in ("scales", "lora", "blockwise"):
            raise ValueError(f"qat.scope={qat.scope} is for a quantized model: choose all, blocks or norms")
    elif scheme.format.keeps_all:
        raise ValueError(f"quant.format={scheme.format.name} quantizes nothing: fine-tune with qat=off")
    else:
        check_trainable(scheme, training_of(qat))


def _check_ranges(qat: QATConfig) -> None:
    """What can be said of each number and word by itself, and of the batch and the steps."""
    for name in ("steps", "batch", "accumulation", "save_every", "window"):
        if getattr(qat, name) < 1:
            raise ValueError(f"qat.{name}={getattr(qat, name)}: must be at least 1")
    for name, (low, high) in RANGES.items():
        if not low <= getattr(qat, name) <= high:
            raise ValueError(f"qat.{name}={getattr(qat, name)}: must lie between {low} and {high:g}")
    if qat.clip < 0 or qat.warmup < 0 or qat.bf16_steps < 0 or qat.check_every < 0:
        raise ValueError("qat.clip, qat.warmup, qat.bf16_steps and qat.check_every must not be negative")
    if len(qat.betas) != 2 or not all(0 <= beta < 1 for beta in qat.betas):
        raise ValueError(f"qat.betas={qat.betas}: two numbers of at least 0 and below 1")
    if qat.lora.rank < 1 or qat.lora.alpha <= 0:
        raise ValueError(f"qat.lora.rank={qat.lora.rank}, qat.lora.alpha={qat.lora.alpha}: must be positive")
    if qat.bf16_steps >= qat.steps:
        raise ValueError(f"qat.bf16_steps={qat.bf16_steps} leaves none of qat.steps={qat.steps} to quantize")
    if qat.batch % (qat.accumulation * processes()):
        raise ValueError(
            f"qat.batch={qat.batch} does not divide into qat.accumulation={qat.accumulation} parts of each of "
            f"{processes()} processes"
        )


def _check_scope(qat: QATConfig, model: SourceModel) -> None:
    """What the scope has no use for, or cannot do without."""
    if qat.samples < 0 or (qat.samples and qat.scope != "blockwise"):
        raise ValueError(f"qat.samples={qat.samples}: at least 0, and for qat.scope=blockwise alone")
    if 0 < qat.samples < 2 * SET_ASIDE:
        raise ValueError(f"qat.samples={qat.samples}: at least {2 * SET_ASIDE}, of which some are set aside")
    if qat.scope == "scales" and qat.bf16_steps:
        raise ValueError("qat.scope=scales has no use for qat.bf16_steps: without rounding there are no scales")
    if qat.scope == "all" and qat.blocks:
        raise ValueError("qat.scope=all trains every block: choose qat.scope=blocks for some")
    if qat.scope == "blocks" and not qat.blocks:
        raise ValueError("qat.scope=blocks needs qat.blocks=[...]")
    if processes() > 1 and model.transformers > 1 and qat.scope != "blockwise":
        # A step may pass by one of them, whose gradients the other processes would wait for.
        raise ValueError("several processes train two transformers with qat.scope=blockwise alone")


def _check_blockwise(qat: QATConfig) -> None:
    if qat.data.source != "trajectories":
        raise ValueError("qat.scope=blockwise learns from BF16's trajectories: qat.data.source=trajectories")
    if qat.loss != LossConfig():
        raise ValueError("qat.scope=blockwise has a loss of its own, the blocks' outputs: leave qat.loss alone")
    if qat.bf16_steps or qat.recompute:
        raise ValueError("qat.scope=blockwise has no use for qat.bf16_steps and qat.recompute")
    if qat.scaling == "delayed":
        raise ValueError("qat.scope=blockwise has all inputs of a block before it: qat.scaling=current")


def _check_prompts(qat: QATConfig, plan: PTQPlan) -> None:
    """No prompt is both learned from and measured on."""
    if qat.data.source == "scenes":  # which leaves them out
        return
    validated = plan.calibration if qat.check_every else ()
    twice = sorted(set(captions_of(qat.data)) & {text for text, _ in (*plan.pairs, *validated)})
    if twice:
        raise ValueError(f"qat.data holds a prompt that is measured on: {twice[0]}")
