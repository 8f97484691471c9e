"""How much a job does, in videos; and what that will need of memory and time."""

from __future__ import annotations

from typing import Any

from wanquant.ptq.plan import PTQPlan
from wanquant.ptq.protect import GREEDY
from wanquant.ptq.sensitivity import kinds
from wanquant.ptq.stages import further_stages
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts


def estimate_resources(plan: PTQPlan, counts: VideoCounts) -> ResourceEstimate:
    """From the shapes alone. Blocks that the data will choose are taken to be the first."""
    model, config = plan.model, plan.config
    blocks = model.protected
    if blocks is None:
        blocks = tuple(range(config.protect.budget * model.transformers))
    rows = min(config.model.batch, len(plan.pairs))
    how = (plan.scheme, blocks, config.protect.modules, plan.settings, counts, rows, plan.device)
    return ResourceEstimate(model.folder, *how, further=lambda needs: further_stages(needs, plan))


def count_videos(plan: PTQPlan) -> VideoCounts:
    """Of a quantization, or of an analysis."""
    config, measured, calibrated = plan.config, len(plan.pairs), len(plan.calibration)
    plain, quantized = _choosing(plan)
    by = config.protect.by
    beside = by in ("sensitivity", GREEDY) or (config.mode == "analyze" and config.analysis.sensitivity)
    errors = config.mode == "analyze" or by == "block_sqnr" or config.eval.block_sqnr
    texts = len({text for text, _ in (*plan.pairs, *plan.calibration)}) + 1  # the negative one
    parts: dict[str, Any] = {"calibrated": calibrated, "choosing": (plain, quantized), "prompts": texts}
    if config.mode == "analyze":
        renamed = (("choose", "analyze"),)
        return VideoCounts(calibrated + plain, quantized, beside=beside, all_beside=True, renamed=renamed, **parts)
    floors = measured + len(plan.other_seeds[0]) if config.eval.noise_floor else 0
    made = 2 * measured + floors
    return VideoCounts(
        calibrated + plain + measured + floors, quantized + measured, made, made, beside, errors, floors=floors, **parts
    )


def _choosing(plan: PTQPlan) -> tuple[int, int]:
    """Videos that are denoised to choose blocks by data, mostly in BF16 and mostly quantized."""
    config, model = plan.config, plan.model
    protect = config.protect
    everything = config.mode == "analyze" and config.analysis.sensitivity
    ranked = everything or protect.by == "sensitivity" or (protect.by == GREEDY and protect.candidates > 0)
    plain = model.blocks if ranked else 0
    quantized = len(kinds(model.shape, protect.modules)) if everything else 0
    errors = config.mode == "analyze" or protect.by == "block_sqnr" or config.eval.block_sqnr
    plain, quantized = plain + errors, quantized + errors
    if protect.by == GREEDY:
        tried = min(protect.candidates * model.transformers or model.blocks, model.blocks)
        quantized += sum(tried - done for done in range(protect.budget * model.transformers))
    reference = 1 if ranked or protect.by == GREEDY else 0
    return (plain + reference) * len(plan.calibration), quantized * len(plan.calibration)
