"""The stages of a job that make something: the quantized transformer, and videos of it and of BF16, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from wanquant.evaluate.compare import Networks, measure
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.plan import PTQPlan
from wanquant.quant import ConversionReport, plan_conversion, quantize_
from wanquant.quant.statistics import Site
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.families import folds_of
from wanquant.wan.generate import Sample
from wanquant.wan.resources.placement import placement_of

#: Videos (reference, sample) that are compared, by the prefix of their metrics.
Couples = Mapping[str, Sequence[tuple[Sample, Sample]]]


def quantize_transformer(
    calibrator: Calibrator, blocks: Sequence[int], stats: Mapping[str, float | Site]
) -> ConversionReport:
    """The pipeline's transformer but for these ``blocks``, for good."""
    transformer, how = calibrator.pipeline.transformer, (calibrator.scheme, blocks, calibrator.modules)
    plan = plan_conversion(transformer, *how)
    with progress("quantize", len(plan.names("converted")), "linear") as tick:
        placed = placement_of(transformer)
        where: dict[str, Any] = {"device": placed.device, "keep": placed.keep_, "hessians": calibrator.hessians()}
        return quantize_(transformer, *how, stats, on_linear=tick, folds=folds_of(transformer), **where)


def bf16_videos(
    pipeline: CachedPipeline, label: str, pairs: list[Pair], how: dict[str, str] | None = None
) -> list[Sample]:
    """``how`` as in ``CachedPipeline.batches``."""
    return pipeline.videos(label, pairs, pipeline.latents(label, pairs, how)[0]) if pairs else []


def quantized_videos(
    pipeline: CachedPipeline, label: str, pairs: list[Pair], how: dict[str, Any], afresh: bool = False
) -> tuple[list[Sample], Counter[str]]:
    """And what quantized linears counted."""
    if not pairs:
        return [], Counter()
    latents, counts = pipeline.latents(label, pairs, how, afresh)
    return pipeline.videos(label, pairs, latents), counts


def compare_videos(plan: PTQPlan, couples: Couples) -> dict[str, Any]:
    """Every metric of every pair of videos, by name."""
    if not any(couples.values()):
        return {}
    with progress("compare", sum(map(len, couples.values())), "pair") as tick:
        networks = Networks.of(plan.config.eval, plan.device)
        return measure(couples, plan.config.model.language == "scenes", tick, networks)


def noise_floors(
    plan: PTQPlan, pipeline: CachedPipeline, baseline: list[Sample]
) -> dict[str, list[tuple[Sample, Sample]]]:
    """BF16 beside itself: the initial noise perturbed by one unit in its last place, and another seed."""
    perturbed = bf16_videos(pipeline, "noise floor: 1 ulp", list(plan.pairs), {"perturbed": "1 ulp"})
    known = {(sample.prompt, sample.seed): sample for sample in baseline}
    further, partners = plan.other_seeds
    for sample in bf16_videos(pipeline, "noise floor: seed", further):
        known[sample.prompt, sample.seed] = sample
    other = [(s, known[s.prompt, partners[s.seed]]) for s in baseline if s.seed in partners]
    return {"floor_ulp.": list(zip(baseline, perturbed, strict=True)), "floor_seed.": other}
