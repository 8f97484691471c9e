"""A PTQ job's config, resolved once: the model's folder and shape, the scheme, the blocks, the pairs, the device.

Whatever can be refused by the config and the model's JSON files is refused here, before a weight is read or fetched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges import flow, perceptual, vbench
from wanquant.evaluate.plan import check_eval
from wanquant.evaluate.prompts import PromptsConfig, following, pairs, pictures, settled
from wanquant.ptq.config import AnalysisConfig, PTQConfig
from wanquant.ptq.protect import GREEDY, ProtectConfig, by_rule, check_protect
from wanquant.quant import plan_conversion
from wanquant.quant.eight_bit import emulates
from wanquant.quant.scheme import Scheme, parse
from wanquant.quant.select import resolve_blocks
from wanquant.wan.cached import Pair
from wanquant.wan.checkpoints.find import check_folder, check_shape, find_model
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig, Picture
from wanquant.wan.device import pick_device
from wanquant.wan.experts import parts_of, shape_of_whole
from wanquant.wan.families import Family, family_of, folds_of
from wanquant.wan.generate import check_generation
from wanquant.wan.load import Transformer
from wanquant.wan.lora import check_loras
from wanquant.wan.outliers import chosen_blocks

P = TypeVar("P", bound="PTQPlan")


@dataclass(frozen=True)
class SourceModel:
    """The model that is quantized, as its JSON files have it.

    files         where they are
    shape         its transformer, or both of Wan2.2 as one, on the meta device
    transformers  1, or 2
    protected     the blocks that stay BF16, numbered through; None where the data will choose them
    outliers      the blocks that outliers are planted in
    loras         bytes of LoRAs beside its weights
    """

    files: ModelFiles
    shape: Transformer
    transformers: int
    protected: tuple[int, ...] | None
    outliers: tuple[int, ...]
    loras: int = 0

    @property
    def blocks(self) -> int:
        """Of all transformers."""
        return len(self.shape.blocks)


@dataclass(frozen=True)
class PTQPlan:
    """``config`` is what ``result.json``, the tracker and the signatures have of it: with the format's own choices, the
    prompts' texts, and batches as they will be. ``pairs`` are measured, ``calibration`` is calibrated on;
    ``pictures`` are the first frames by prompt, of a model that takes them."""

    config: PTQConfig
    scheme: Scheme
    model: SourceModel
    device: torch.device
    pairs: tuple[Pair, ...]
    calibration: tuple[Pair, ...]
    pictures: Mapping[str, Picture]

    @property
    def settings(self) -> GenerationConfig:
        return self.config.model.generation

    def __str__(self) -> str:
        config, settings, threads = self.config, self.settings, self.config.threads
        shown = self.calibration if config.mode == "analyze" else self.pairs
        how = "" if config.eval.videos else ", single steps without videos"
        how += (
            f"; products of {self.scheme.product.upper()} codes are taken in BF16 here"
            if emulates(self.scheme, self.device)
            else ""
        )
        return (
            f"{config.quant.name} on {config.model.name} ({self.device.type}, {threads} "
            f"thread{'s' if threads > 1 else ''}), protect {config.protect.name}: {len(shown)} (prompt, seed) pairs "
            f"of {settings.num_frames} frames {settings.height}x{settings.width}, {settings.steps} steps, in batches "
            f"of {config.model.batch}{how}"
        )

    @cached_property
    def other_seeds(self) -> tuple[list[Pair], dict[int, int]]:
        """Of the noise floor: the videos to generate besides, and with which other seed each seed is compared. A single
        seed gets a further one."""
        seeds = self.config.prompts.seeds
        if len(seeds) > 1:
            return [], following(seeds)
        further = [(text, seeds[0] + 1) for text in dict.fromkeys(text for text, _ in self.pairs)]
        return further, {seeds[0]: seeds[0] + 1}

    def counted(self, protected: tuple[int, ...] | None) -> dict[str, Any]:
        """The config with all that cannot change the numbers put to its default, to be signed.

        ``protected`` are the blocks once they are known: how they were chosen changes nothing but which they are. Until
        then, and in an analysis, the calibration videos count in their batches too.
        """
        config = self.config
        batches = [min(config.model.batch, len(videos)) for videos in (self.pairs, self.calibration)]
        if config.mode == "analyze":
            replayed = config.analysis.sensitivity or config.protect.by in ("sensitivity", GREEDY)
            alone = EvalConfig(single_steps=config.eval.single_steps) if replayed else EvalConfig()
            config = dataclasses.replace(config, prompts=PromptsConfig(), eval=alone)
            batches = batches[1:]
        else:
            config = dataclasses.replace(config, analysis=AnalysisConfig(bins=config.analysis.bins))
            if not config.eval.videos:
                steps, errors = config.eval.single_steps, config.eval.block_sqnr
                alone = EvalConfig(videos=False, single_steps=steps, block_sqnr=errors)
                config = dataclasses.replace(config, eval=alone)
        if protected is not None:
            blocks = list(resolve_blocks(protected, self.model.blocks))
            config = dataclasses.replace(config, protect=ProtectConfig(blocks=blocks, modules=config.protect.modules))
            batches = batches[:1]
        found = dataclasses.asdict(config)
        found["model"]["batch"] = batches
        for group in ("prompts", "calib"):  # by what they show, wherever they lie
            texts = found[group]["texts"] if found[group].pop("images") else []
            found |= {f"{group}.images": [self.pictures[text].sha256 for text in texts]} if texts else {}
        return found


def resolve(config: PTQConfig) -> PTQPlan:
    """``ValueError`` names the key at fault and what it may be."""
    config.check()
    scheme = parse(config.quant)
    if scheme.act_steps > config.model.generation.steps:
        told = f"calibration has {config.model.generation.steps} denoising steps"
        raise ValueError(f"quant.activations.steps={scheme.act_steps}: {told}, choose that or fewer")
    config = _settled(config, scheme)
    measured, calibration = pairs(config.prompts), pairs(config.calib, "calib")
    device = pick_device(config.model.device)
    check_eval(config.eval)
    side = min(config.model.generation.height, config.model.generation.width)
    vbench.refuse_pointless(config.eval.dimensions, [text for text, _ in measured], side)
    model = resolve_model(config, scheme, find_model(config.model.path, config.model.base, shapes_only=True))
    family = check_shape(model.files)
    found = _pictures(config, family)
    if family.takes_pictures:  # the pipelines take one at a time
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, batch=1))
    return PTQPlan(config, scheme, model, device, tuple(measured), tuple(calibration), found)


def _pictures(config: PTQConfig, family: Family) -> dict[str, Picture]:
    """Of what is calibrated on, and of what is measured."""
    taken, needed = family.takes_pictures, family.needs_pictures
    found = pictures(config.calib, taken, "calib", needed)
    measured = pictures(config.prompts, taken, needed=needed) if config.mode != "analyze" or not taken else {}
    if measured and len(found) != len(settled(config.calib).texts) and config.mode != "analyze":
        raise ValueError("calib.images: give one for each text, as prompts.images does, or leave both out")
    if found and not measured and config.mode != "analyze":
        raise ValueError("prompts.images: give one for each text, as calib.images does, or leave both out")
    for text, picture in measured.items():
        if found.setdefault(text, picture).sha256 != picture.sha256:
            raise ValueError(f"prompts.images: the text {text!r} has another picture in calib.images")
    return found


def with_weights(plan: P) -> P:
    """The same of the model with its weights, which are fetched if they are on the hub, and whole."""
    files = find_model(plan.config.model.path, plan.config.model.base)
    check_folder(files)
    return dataclasses.replace(plan, model=resolve_model(plan.config, plan.scheme, files))


def _settled(config: PTQConfig, scheme: Scheme) -> PTQConfig:
    """The config with the format's own choices, the prompts' texts, no more bins than denoising steps, and videos one
    at a time where a batch would share a scale: the videos of a real run come alone."""
    alone = config.model.batch > 1 and not scheme.independent
    others = [n for n in dict.fromkeys(config.model.other_frames) if n != config.model.generation.num_frames]
    return dataclasses.replace(
        config,
        quant=scheme.config,
        model=dataclasses.replace(config.model, batch=1 if alone else config.model.batch, other_frames=others),
        analysis=dataclasses.replace(config.analysis, bins=min(config.analysis.bins, config.model.generation.steps)),
        eval=_settled_eval(config.eval, config.model.generation),
        prompts=settled(config.prompts),
        calib=settled(config.calib),
    )


def _settled_eval(config: EvalConfig, generation: GenerationConfig) -> EvalConfig:
    """With what is there to measure by, and no more single steps than there are."""
    return dataclasses.replace(
        config,
        lpips=perceptual.settled(config.lpips),
        flow=flow.settled(config.flow),
        single_steps=min(config.single_steps, generation.steps),
    )


def resolve_model(config: PTQConfig, scheme: Scheme, files: ModelFiles) -> SourceModel:
    """Refuses what a model of this shape cannot be quantized to."""
    if config.mode != "convert" or files.is_pipeline:
        check_shape(files)
    by_data = config.protect.needs_data
    if by_data and scheme.format.keeps_all:
        raise ValueError(f"protect.by={config.protect.by} measures a quantization, and {scheme.format.name} is none")
    if any(part.quantization is not None for part in files.transformers.values()):
        raise ValueError(f"{files} is quantized already: model.path must be the original model")
    shape = shape_of_whole(files)
    if config.mode != "convert":  # which generates nothing
        check_generation(files, config.model.generation)
    blocks, transformers = len(shape.blocks), len(parts_of(shape))
    first: Any = parts_of(shape)[0]
    family = family_of(type(first).__name__)
    loras = check_loras(config.model, shape)
    beside = family.beside(first.config)
    check_protect(config.protect, blocks // transformers - len(beside))
    outliers = chosen_blocks(config.model.outliers, blocks)
    if outliers and not folds_of(shape):
        raise ValueError(f"model.outliers: nothing in a {type(first).__name__} can hold them exactly")
    protected = None if by_data else resolve_blocks(by_rule(config.protect, blocks, transformers, beside), blocks)
    kept = range(config.protect.budget) if protected is None else protected
    plan = plan_conversion(shape, scheme, list(kept), config.protect.modules)
    if not plan.names("converted") and not scheme.format.keeps_all:
        raise ValueError("protect leaves no linear to quantize: protect fewer blocks or modules")
    return SourceModel(files, shape, transformers, protected, outliers, loras)
