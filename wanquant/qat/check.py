"""A training's config, resolved once, as ``wanquant.ptq.plan`` does it; and what of it counts."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from wanquant.choices import check_choices
from wanquant.evaluate.prompts import pairs, settled
from wanquant.ptq.config import check_captions
from wanquant.ptq.plan import PTQPlan, SourceModel, resolve
from wanquant.qat.config import SET_ASIDE, LoraSize, LossConfig, QATConfig, TrainConfig, processes
from wanquant.qat.data import captions_of, check_data, contents
from wanquant.qat.loss import check_loss
from wanquant.qat.scope import trains_weights
from wanquant.quant.config import QuantConfig
from wanquant.quant.select import resolve_blocks
from wanquant.quant.trainable import Training, check_trainable
from wanquant.wan.cached import Pair
from wanquant.wan.device import pick_device


@dataclass(frozen=True)
class TrainPlan(PTQPlan):
    """``learned`` are the pairs whose BF16 trajectories are learned from, if that is the source; ``training`` is how
    each quantized linear is trained."""

    config: TrainConfig
    learned: tuple[Pair, ...]
    training: Training

    @property
    def qat(self) -> QATConfig:
        return self.config.qat

    @property
    def samples(self) -> int:
        """That are recorded to be learned from."""
        return len(self.learned) * self.settings.steps * self.settings.branches


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
    recorded = data.source == "trajectories"
    learned = pairs(data.prompts, "qat.data.prompts") if recorded else []
    if config.model.language == "scenes":
        check_captions(text for text, _ in learned)
    plan = resolve(config)
    check_qat(config, plan)
    fields_ = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return TrainPlan(**fields_, learned=tuple(learned), training=training_of(config.qat))


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


def check_qat(config: TrainConfig, plan: PTQPlan) -> None:
    qat = config.qat
    if config.mode != "quantize":
        raise ValueError(f"mode={config.mode}: train.py has no other than quantize")
    _check_ranges(qat)
    _check_scope(qat, plan.model)
    check_data(qat.data, config.model.language)
    check_loss(qat.loss, qat.data.source)
    _check_source(config, plan)
    scheme = plan.scheme
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
    for name, low, high in (
        ("lr", 0, 10),
        ("floor", 0, 1),
        ("ema", 0, 1),
        ("diverged", 1, 1e9),
        ("weight_decay", 0, 10),
    ):
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
    resolve_blocks(qat.blocks, model.blocks, "trained")
    if processes() > 1 and model.transformers > 1 and qat.scope != "blockwise":
        # A step may pass by one of them, whose gradients the other processes would wait for.
        raise ValueError("several processes train two transformers with qat.scope=blockwise alone")


def _check_source(config: TrainConfig, plan: PTQPlan) -> None:
    qat = config.qat
    if qat.scope == "blockwise":
        if qat.data.source != "trajectories":
            raise ValueError("qat.scope=blockwise learns from BF16's trajectories: qat.data.source=trajectories")
        if vars(qat.loss) != vars(LossConfig()):
            raise ValueError("qat.scope=blockwise has a loss of its own, the blocks' outputs: leave qat.loss alone")
        if qat.bf16_steps or qat.recompute:
            raise ValueError("qat.scope=blockwise has no use for qat.bf16_steps and qat.recompute")
        if qat.scaling == "delayed":
            raise ValueError("qat.scope=blockwise has all inputs of a block before it: qat.scaling=current")
    if qat.data.source == "scenes":  # which leaves them out
        return
    measured = {text for text, _ in plan.pairs}
    validated = {text for text, _ in plan.calibration} if qat.check_every else set()
    twice = sorted(set(captions_of(qat.data)) & (measured | validated))
    if twice:
        raise ValueError(f"qat.data holds a prompt that is measured on: {twice[0]}")


#: What of the training changes no number.
UNCOUNTED = ("name", "save_every", "data")


def counted(qat: QATConfig) -> dict[str, Any]:
    """All of the training that can change a number; data by what they are, wherever they lie."""
    lora = qat.lora if qat.scope == "lora" else LoraSize()
    window = qat.window if qat.scaling == "delayed" else QATConfig().window
    found = dataclasses.asdict(dataclasses.replace(qat, lora=lora, window=window))
    return {**{key: value for key, value in found.items() if key not in UNCOUNTED}, "data": contents(qat.data)}
