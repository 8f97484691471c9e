"""What of a PTQ config can be refused before anything is loaded, and what of it counts."""

from __future__ import annotations

import dataclasses
from typing import Any

from wanquant.choices import check_choices
from wanquant.evaluate import perceptual, vbench
from wanquant.evaluate.check import check_eval
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.prompts import PromptsConfig, pairs, settled
from wanquant.ptq.config import AnalysisConfig, ConvertConfig, PTQConfig
from wanquant.ptq.protect import GREEDY, MEASURES, ProtectConfig, by_rule, check_protect
from wanquant.quant import plan_conversion
from wanquant.quant.scheme import parse, settle
from wanquant.quant.select import resolve_blocks
from wanquant.wan.checkpoint import quantization_of
from wanquant.wan.experts import parts_of, shape_of_whole
from wanquant.wan.generate import check_guidance
from wanquant.wan.load import Transformer, check_shape, find_folder, transformers_of
from wanquant.wan.outliers import chosen_blocks
from wanquant.wan.tiny import parse_caption


def check(config: PTQConfig, videos: list[tuple[str, int]]) -> None:
    """Refuses what can be refused by the config and the model's shape, before a weight is read or fetched."""
    check_choices(config)
    scheme = parse(config.quant)
    check_eval(config.eval)
    if config.convert != ConvertConfig():
        raise ValueError(f"convert is for mode=convert, not for mode={config.mode}")
    if config.analysis.bins < 1:
        raise ValueError(f"analysis.bins={config.analysis.bins}: must be at least 1")
    if config.mode == "analyze":
        if config.eval.dimensions:
            raise ValueError("mode=analyze makes no videos to judge: leave eval.dimensions out")
        if scheme.format.name != "hif8":
            raise ValueError(f"mode=analyze looks at HiF8, not at {scheme.format.name}: leave quant.format as it is")
    size = config.model.generation
    vbench.refuse_pointless(
        config.eval.dimensions, [text for text, _ in pairs(config.prompts)], min(size.height, size.width)
    )
    if config.threads < 1:
        raise ValueError(f"threads={config.threads}: must be at least 1")
    if config.model.batch < 1:
        raise ValueError(f"model.batch={config.model.batch}: must be at least 1")
    if config.model.language == "scenes":
        for prompt, _ in videos:
            parse_caption(prompt)
    check_model(config)


def check_model(config: PTQConfig) -> None:
    """Refuses what a model of this shape cannot be quantized to, by its JSON files."""
    scheme = parse(config.quant)
    folder = find_folder(config.model.path, shapes_only=True)
    if config.mode != "convert" or (folder / "model_index.json").is_file():
        check_shape(folder)
    by_data = config.protect.by in (*MEASURES, GREEDY)
    if by_data and scheme.format.keeps_all:
        raise ValueError(f"protect.by={config.protect.by} measures a quantization, and {scheme.format.name} is none")
    for part in transformers_of(folder).values():
        if quantization_of(part) is not None:
            raise ValueError(f"{folder} is quantized already: model.path must be the original model")
    shape = shape_of_whole(folder)
    if config.mode != "convert":  # which generates nothing
        check_guidance(folder, config.model.generation)
    blocks, transformers = len(shape.blocks), len(parts_of(shape))
    check_protect(config.protect, blocks // transformers)
    chosen_blocks(config.model.outliers, blocks)
    kept = range(config.protect.budget) if by_data else by_rule(config.protect, blocks, transformers)
    plan = plan_conversion(shape, config.quant, list(kept), config.protect.modules)
    if not plan.names("converted") and not scheme.format.keeps_all:
        raise ValueError("protect leaves no linear to quantize: protect fewer blocks or modules")


def settle_config(config: PTQConfig) -> PTQConfig:
    """The config with the format's own choices, the prompts' texts, no more bins than steps, and videos one at a time
    where a batch would share a step: the videos of a real run come alone."""
    quant = settle(config.quant)
    alone = config.model.batch > 1 and not parse(quant).independent
    model = dataclasses.replace(config.model, batch=1) if alone else config.model
    bins = min(config.analysis.bins, config.model.generation.steps)
    analysis = dataclasses.replace(config.analysis, bins=bins)
    eval_ = dataclasses.replace(config.eval, lpips=perceptual.settled(config.eval.lpips))
    prompts, calib = settled(config.prompts), settled(config.calib)
    return dataclasses.replace(
        config, quant=quant, model=model, analysis=analysis, eval=eval_, prompts=prompts, calib=calib
    )


def identity(config: PTQConfig, blocks: int, protected: list[int] | None) -> dict[str, Any]:
    """The config with all that cannot change the numbers of this run put to its default, to be signed.

    ``protected`` are the blocks once they are known: how they were chosen changes nothing but which they are. Until
    then, and in an analysis, the calibration videos count in their batches too.
    """
    videos, calibration = len(pairs(config.prompts)), len(pairs(config.calib, "calib"))
    batches = [min(config.model.batch, count) for count in (videos, calibration)]
    if config.mode == "analyze":
        config = dataclasses.replace(config, prompts=PromptsConfig(), eval=EvalConfig())
        batches = batches[1:]
    else:
        config = dataclasses.replace(config, analysis=AnalysisConfig(bins=config.analysis.bins))
    if protected is not None:
        settled = ProtectConfig(blocks=list(resolve_blocks(protected, blocks)), modules=config.protect.modules)
        config = dataclasses.replace(config, protect=settled)
        batches = batches[:1]
    counted = dataclasses.asdict(config)
    counted["model"]["batch"] = batches
    return counted


def rule_blocks(config: ProtectConfig, shape: Transformer) -> list[int] | None:
    """The protected blocks where no data are needed to know them."""
    if config.by in (*MEASURES, GREEDY):
        return None
    return by_rule(config, len(shape.blocks), len(parts_of(shape)))
