"""What a job needs of memory and time: how many videos it denoises, and the seconds of its stages that are no
denoising: loading, quantizing, comparing, writing."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from wanquant.evaluate.compare import Networks, of_pair
from wanquant.evaluate.config import EvalConfig
from wanquant.ptq.plan import PTQPlan
from wanquant.ptq.protect import GREEDY
from wanquant.ptq.sensitivity import kinds
from wanquant.quant import quantize_
from wanquant.quant.scheme import Scheme
from wanquant.quant.statistics import INPUT, Layout, Observer, Site
from wanquant.runs import pictures
from wanquant.runs.cache import Cells
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.generate import Sample
from wanquant.wan.load import load_pipeline
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts
from wanquant.wan.resources.footprint import once

#: Pixels of a video, and weights of a linear, that are run to be timed at most; larger ones in proportion.
PIXELS, WEIGHTS = 1 << 18, 1 << 20
#: Channels of an input whose error feedback is timed at most; it takes their square, for each row.
FED = 1024
#: What sending a finished run to W&B takes, over importing the package: 1.95 s over 0.94 s, offline, on two cores.
TRACKER = 2.0
PROBE = "blocks.0.probed"
#: Bytes of a pipeline that is loaded to be timed, at most.
LOADED = 200_000_000


def estimate_resources(plan: PTQPlan, counts: VideoCounts) -> ResourceEstimate:
    """From the shapes alone. Blocks that the data will choose are taken to be the first."""
    model, config = plan.model, plan.config
    blocks = model.protected
    if blocks is None:
        blocks = tuple(range(config.protect.budget * model.transformers))
    rows = min(config.model.batch, len(plan.pairs))
    how = (plan.scheme, blocks, config.protect.modules, plan.settings, counts, rows, plan.device)
    return ResourceEstimate(model.files, *how, loras=model.loras, further=lambda needs: further_stages(needs, plan))


def predicted(
    needs: ResourceEstimate, cells: Cells, tracker: str, needed: Callable[[ResourceEstimate], dict[str, Any]]
) -> dict[str, Any]:
    """``bytes`` beside those there were before, and ``seconds`` by stage, as ``needed`` reads them off the estimate.
    Probed once for each cache (``cells``), and again if other work disturbed the probe."""
    begun, outside = time.perf_counter(), start_and_end(tracker)
    known = cells.get("stages")
    if known is not None and known["guess"]:
        cells.put("stages", needed(needs))
    found: dict[str, Any] = cells.measured("stages", lambda: needed(needs))
    stages = {**outside, "plan": time.perf_counter() - begun, **found["stages"]}
    return {**found, "seconds": sum(stages.values()), "stages": stages}


def count_videos(plan: PTQPlan) -> VideoCounts:
    """Of a quantization, or of an analysis."""
    config, measured, calibrated = plan.config, len(plan.pairs), len(plan.calibration)
    (plain, quantized), replays = _choosing(plan), _replays(plan)
    by = config.protect.by
    beside = by in ("sensitivity", GREEDY) or (config.mode == "analyze" and config.analysis.sensitivity)
    errors = config.mode == "analyze" or by == "block_sqnr" or config.eval.block_sqnr
    texts = len({text for text, _ in (*plan.pairs, *plan.calibration)}) + 1  # the negative one
    share = config.eval.single_steps / plan.settings.steps
    parts: dict[str, Any] = {"calibrated": calibrated, "choosing": (plain, quantized), "prompts": texts}
    parts["replays"] = (replays[0] * share, replays[1] * share)
    kept, own = config.eval.single_steps, plan.settings.num_frames
    chosen_on = ((calibrated * kept, own),) if any(replays) else ()
    if config.mode == "analyze":
        renamed = (("choose", "analyze"),)
        parts |= {"beside": beside, "all_beside": True, "renamed": renamed, "recorded_steps": chosen_on}
        return VideoCounts(calibrated + plain, quantized, **parts)
    # A trajectory of another length counts by its latent frames.
    lengths = [
        ((frames - 1) // 4 + 1) / ((plan.settings.num_frames - 1) // 4 + 1) for frames in config.model.other_frames
    ]
    parts["replayed"] = measured * share * (1 + sum(lengths))
    parts |= {"other_lengths": measured * sum(lengths), "longest": max(config.model.other_frames, default=0)}
    parts["recorded_steps"] = (*chosen_on, *((measured * kept, frames) for frames in (own, *config.model.other_frames)))
    if not config.eval.videos:
        return VideoCounts(calibrated + plain + measured, quantized, beside=beside, all_beside=errors, **parts)
    floors = measured + len(plan.other_seeds[0]) if config.eval.noise_floor else 0
    made = 2 * measured + floors
    return VideoCounts(
        calibrated + plain + measured + floors, quantized + measured, made, made, beside, errors, floors=floors, **parts
    )


def _choosing(plan: PTQPlan) -> tuple[int, int]:
    """Videos that are denoised to choose blocks by data: in BF16 to be recorded, and beside quantized copies of all
    blocks, which counts for one in BF16 and one quantized."""
    config = plan.config
    errors = config.mode == "analyze" or config.protect.by == "block_sqnr" or config.eval.block_sqnr
    return (errors + any(_replays(plan))) * len(plan.calibration), errors * len(plan.calibration)


def _replays(plan: PTQPlan) -> tuple[int, int]:
    """Calibration videos whose steps are replayed to choose blocks: with little quantized, and with most of it."""
    config, model = plan.config, plan.model
    protect = config.protect
    everything = config.mode == "analyze" and config.analysis.sensitivity
    ranked = everything or protect.by == "sensitivity" or (protect.by == GREEDY and protect.candidates > 0)
    alone = model.blocks if ranked else 0
    most = len(kinds(model.shape, protect.modules)) if everything else 0
    if protect.by == GREEDY:
        tried = min(protect.candidates * model.transformers or model.blocks, model.blocks)
        most += sum(tried - done for done in range(protect.budget * model.transformers))
    return alone * len(plan.calibration), most * len(plan.calibration)


def further_stages(needs: ResourceEstimate, plan: PTQPlan) -> dict[str, float]:
    config = plan.config
    if config.mode != "quantize":
        return {}
    stages = {
        "load": _loading(needs.files, needs.weights + needs.others, needs.device),
        "quantize": _quantizing(needs),
    }
    return stages | (_video_stages(plan) if needs.counts.held else {})


def _video_stages(plan: PTQPlan) -> dict[str, float]:
    config = plan.config
    measured, settings, floors = len(plan.pairs), plan.settings, config.eval.noise_floor
    side = min(settings.height, settings.width, 64)
    frames = max(1, min(settings.num_frames, PIXELS // side**2))
    scale = settings.num_frames * settings.height * settings.width / (frames * side * side)
    prompt = plan.pairs[0][0] if config.model.language == "scenes" else None
    comparing = _comparing(frames, side, prompt, config.eval.lpips, config.eval.flow, plan.device)
    return {
        "compare": measured * (3 if floors else 1) * comparing * scale,
        "write": measured * _writing(frames, side, settings.fps, 3 if floors else 2) * scale,
    }


def _video(frames: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).random((frames, side, side, 3), dtype=np.float32)


@once
def _comparing(frames: int, side: int, prompt: str | None, lpips: str, flow: str, device: torch.device) -> float:
    """Of a pair of videos; with a ``prompt`` of tiny-wan's attributes are looked for too."""
    video, networks = _video(frames, side), Networks.of(EvalConfig(lpips=lpips, flow=flow), device)
    a, b = (Sample(prompt or "", 0, torch.zeros(1), changed) for changed in (video, 0.9 * video))
    return _seconds(lambda: of_pair(b, a, prompt is not None, networks))


@once
def _writing(frames: int, side: int, fps: int, files: int) -> float:
    """Of so many files of a video, and one with two side by side."""
    shown = pictures.to_uint8(0.2 + 0.1 * _video(frames, side))  # as quiet as a generated one
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"

        def write() -> None:
            for _ in range(files):
                pictures.write_mp4(path, shown, fps)
            pictures.write_mp4(path, pictures.side_by_side((shown, shown), ("BF16", "")), fps)

        return _seconds(write)


#: Whether this process has begun a job: the start counts for the first of a sweep.
_begun = False


def start_and_end(tracker: str) -> dict[str, float]:
    """Seconds since the start of the process, which are over; and of the tracker at its end, in ratio to its import."""
    global _begun
    found = {"start": 0.0 if _begun else time.time() - psutil.Process().create_time()}
    _begun = True
    if tracker == "wandb":
        found["tracker"] = TRACKER * _importing_tracker()
    return found


@cache
def _importing_tracker() -> float:
    """Nothing where something has imported it before."""
    begun = time.perf_counter()
    importlib.import_module("wandb")
    return time.perf_counter() - begun


@once
def _loading(files: ModelFiles, size: int, device: torch.device) -> float:
    """By loading it, where that is small and there; else nothing is known of the disk, and nothing counted."""
    if size > LOADED or not all(part.as_diffusers and part.is_there for part in files.transformers.values()):
        return 0.0
    return _seconds(lambda: load_pipeline(files, str(device)))


def _quantizing(needs: ResourceEstimate) -> float:
    """All linears, by the first of them or as much of it as is probed; in proportion to their weights."""
    if not needs.converted:
        return 0.0
    linear = needs.shape.get_submodule(needs.converted[0])
    assert isinstance(linear, nn.Linear)
    feedback, columns = needs.scheme.feedback, linear.in_features
    columns = min(columns, FED) if feedback else columns
    rows = max(1, min(linear.out_features, WEIGHTS // columns))
    each = _quantizing_one(columns, rows, needs.scheme, needs.device)
    if linear.weight.numel() <= WEIGHTS:
        return each * len(needs.converted)
    work = needs.fed_weights / columns if feedback else needs.quantized_weights
    return each * work / (rows * columns)


@once
def _quantizing_one(columns: int, rows: int, scheme: Scheme, device: torch.device) -> float:
    inputs = replace(scheme.config.activations, steps=1)  # found of several there
    alone = replace(scheme.config, attention="off", activations=inputs)  # attention needs three linears
    seen: float | Site = 1.0

    def root() -> nn.Module:
        found, block = nn.Module(), nn.Module()
        block.probed = nn.Linear(columns, rows, device=device, dtype=torch.bfloat16)
        found.blocks = nn.ModuleList([block])
        return found

    if scheme.needs_statistics:
        given = root()
        with torch.no_grad(), Observer(given, Layout(("",), 1, 1, 1), lambda: (0, 0, 0)) as observer:
            given.get_submodule(PROBE)(torch.randn(16, columns, device=device).bfloat16())
        seen = observer.statistics.site(PROBE, INPUT)
    hessians = {PROBE: torch.eye(columns)} if scheme.feedback else {}
    return _seconds(lambda: quantize_(root(), alone, (), (), {PROBE: seen}, hessians=hessians))


def _seconds(run: Callable[[], object]) -> float:
    """Of the second call: the first is for warmth."""
    run()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
