"""A training's config, resolved once, as ``wanquant.ptq.plan`` does it; and what of it counts."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from wanquant.evaluate.prompts import pairs, pictures, settled
from wanquant.kernels.products import multiplies_bf16
from wanquant.ptq.plan import PTQPlan, resolve
from wanquant.qat.config import LoraSize, QATConfig
from wanquant.qat.data import contents
from wanquant.qat.scope import trains_weights
from wanquant.qat.state import sharding
from wanquant.qat.train_config import TrainConfig
from wanquant.quant.config import QuantConfig
from wanquant.quant.select import resolve_blocks
from wanquant.quant.trainable import Training, check_trainable
from wanquant.runs.launch import processes
from wanquant.runs.signature import installed
from wanquant.wan.cached import Pair
from wanquant.wan.checkpoints.find import check_shape
from wanquant.wan.device import pick_device


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
    config.check()
    data = dataclasses.replace(config.qat.data, prompts=settled(config.qat.data.prompts))
    config = dataclasses.replace(
        config,
        quant=config.quant if config.qat.quantize else QuantConfig(name="bf16", format="bf16"),
        model=dataclasses.replace(config.model, device=_own_card(config.model.device)),
        qat=dataclasses.replace(config.qat, data=data),
    )
    learned = pairs(data.prompts, "qat.data.prompts") if data.source == "trajectories" else []
    pictures(data.prompts, False, "qat.data.prompts")
    plan = resolve(config)
    family = check_shape(plan.model.files)
    if not family.is_wan:
        raise ValueError(f"train.py trains Wan's transformers, and model.path is a {family.pipeline.__name__}")
    _check(config.qat, plan)
    blocks = resolve_blocks(config.qat.blocks or range(plan.model.blocks), plan.model.blocks, "trained")
    resolved = {each.name: getattr(plan, each.name) for each in dataclasses.fields(plan)}
    return TrainPlan(**resolved, learned=tuple(learned), training=training_of(config.qat), chosen=blocks)


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


def check_sharded(qat: QATConfig) -> None:
    """What cannot be trained in shards, to which accelerate is configured."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate is configured to shard by FSDP 1: launch with --fsdp_version 2")
    if qat.scope == "blockwise":
        raise ValueError("qat.scope=blockwise has no more than a block in training: launch it without --use_fsdp")
    if qat.check_every:
        raise ValueError("qat.check_every validates whole models: 0, or launch without --use_fsdp")


def _check(qat: QATConfig, plan: PTQPlan) -> None:
    """What depends on the format and the model."""
    offload = plan.config.model.offload
    if offload in ("group", "disk") and qat.scope != "blockwise":
        raise ValueError(
            f"model.offload={offload}: qat.scope={qat.scope} trains all blocks at once, on the device: choose "
            "qat.scope=blockwise, or model.offload=none"
        )
    if check_shape(plan.model.files).takes_pictures:
        raise ValueError(f"{plan.config.model.path} makes videos of pictures: train.py trains text-to-video models")
    if processes() > 1 and plan.model.transformers > 1 and qat.scope != "blockwise":
        # A step may pass by one of them, whose gradients the other processes would wait for.
        raise ValueError("several processes train two transformers with qat.scope=blockwise alone")
    if processes() > 1 and sharding():
        check_sharded(qat)
    if qat.quantize and plan.scheme.format.keeps_all:
        raise ValueError(f"quant.format={plan.scheme.format.name} quantizes nothing: fine-tune with qat=off")
    if qat.quantize:
        check_trainable(plan.scheme, training_of(qat))
