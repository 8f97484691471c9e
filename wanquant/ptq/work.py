"""How much a job does, in videos, from its config alone; and the plan of it."""

from __future__ import annotations

from typing import Any

import torch

from wanquant.evaluate.prompts import PromptsConfig, following, pairs
from wanquant.ptq.check import rule_blocks
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.protect import GREEDY
from wanquant.ptq.sensitivity import kinds
from wanquant.ptq.stages import further_stages
from wanquant.wan.experts import parts_of, shape_of_whole
from wanquant.wan.load import find_folder
from wanquant.wan.plan import Plan, Work


def make_plan(config: PTQConfig, device: torch.device, work: Work) -> Plan:
    """From the JSON files alone. Blocks that the data will choose are taken to be the first."""
    folder = find_folder(config.model.path, shapes_only=True)
    shape = shape_of_whole(folder)
    blocks = rule_blocks(config.protect, shape)
    if blocks is None:
        blocks = list(range(config.protect.budget * len(parts_of(shape))))
    rows = min(config.model.batch, max(1, len(pairs(config.prompts))))
    how = (config.quant, blocks, config.protect.modules, config.model.generation, work, rows, device)
    return Plan(folder, *how, further=lambda plan: further_stages(plan, config))


def work_of(config: PTQConfig) -> Work:
    """Of a quantization, or of an analysis."""
    measured, calibrated = len(pairs(config.prompts)), len(pairs(config.calib, "calib"))
    plain, quantized = _choosing(config, calibrated)
    by = config.protect.by
    beside = by in ("sensitivity", GREEDY) or (config.mode == "analyze" and config.analysis.sensitivity)
    errors = config.mode == "analyze" or by == "block_sqnr" or config.eval.block_sqnr
    texts = len({text for text, _ in [*pairs(config.prompts), *pairs(config.calib, "calib")]}) + 1  # the negative one
    parts: dict[str, Any] = {"calibrated": calibrated, "choosing": (plain, quantized), "prompts": texts}
    if config.mode == "analyze":
        renamed = (("choose", "analyze"),)
        return Work(calibrated + plain, quantized, beside=beside, all_beside=True, renamed=renamed, **parts)
    floors = measured + len(other_seed(config.prompts)[0]) if config.eval.noise_floor else 0
    made = 2 * measured + floors
    return Work(
        calibrated + plain + measured + floors, quantized + measured, made, made, beside, errors, floors=floors, **parts
    )


def _choosing(config: PTQConfig, calibrated: int) -> tuple[int, int]:
    """Videos that are denoised to choose blocks by data, mostly in BF16 and mostly quantized."""
    protect = config.protect
    shape = shape_of_whole(find_folder(config.model.path, shapes_only=True))
    parts = len(parts_of(shape))
    everything = config.mode == "analyze" and config.analysis.sensitivity
    ranked = everything or protect.by == "sensitivity" or (protect.by == GREEDY and protect.candidates > 0)
    plain = len(shape.blocks) if ranked else 0
    quantized = len(kinds(shape, protect.modules)) if everything else 0
    errors = config.mode == "analyze" or protect.by == "block_sqnr" or config.eval.block_sqnr
    plain, quantized = plain + errors, quantized + errors
    if protect.by == GREEDY:
        tried = min(protect.candidates * parts or len(shape.blocks), len(shape.blocks))
        quantized += sum(tried - done for done in range(protect.budget * parts))
    reference = 1 if ranked or protect.by == GREEDY else 0
    return (plain + reference) * calibrated, quantized * calibrated


def other_seed(prompts: PromptsConfig) -> tuple[list[tuple[str, int]], dict[int, int]]:
    """The videos to generate besides, and with which other seed each seed is compared. A single one gets a further."""
    seeds = prompts.seeds
    if len(seeds) == 1:
        texts = dict.fromkeys(text for text, _ in pairs(prompts))
        return [(text, seeds[0] + 1) for text in texts], {seeds[0]: seeds[0] + 1}
    return [], following(seeds)
