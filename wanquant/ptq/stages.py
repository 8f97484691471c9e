"""Seconds of the stages of a quantization that are no denoising: quantizing, comparing, writing."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from wanquant.evaluate.compare import of_pair
from wanquant.evaluate.judges.perceptual import distance
from wanquant.ptq.plan import PTQPlan
from wanquant.quant import quantize_
from wanquant.quant.observe import Observer
from wanquant.quant.scheme import Scheme
from wanquant.quant.statistics import INPUT, Layout, Site
from wanquant.runs import pictures
from wanquant.wan.estimate import ResourceEstimate
from wanquant.wan.footprint import once
from wanquant.wan.generate import Sample
from wanquant.wan.load import load_pipeline

#: Pixels of a video, and weights of a linear, that are run to be timed at most; larger ones in proportion.
PIXELS, WEIGHTS = 1 << 18, 1 << 20
#: What sending a finished run to W&B takes, over importing the package: 1.95 s over 0.94 s, offline, on two cores.
TRACKER = 2.0
PROBE = "blocks.0.probed"
#: Bytes of a pipeline that is loaded to be timed, at most.
LOADED = 200_000_000


def further_stages(needs: ResourceEstimate, plan: PTQPlan) -> dict[str, float]:
    config = plan.config
    if config.mode != "quantize" or not needs.counts.held:
        return {}
    measured, settings, floors = len(plan.pairs), plan.settings, config.eval.noise_floor
    side = min(settings.height, settings.width, 64)
    frames = max(1, min(settings.num_frames, PIXELS // side**2))
    scale = settings.num_frames * settings.height * settings.width / (frames * side * side)
    prompt = plan.pairs[0][0] if config.model.language == "scenes" else None
    comparing = _comparing(frames, side, prompt, config.eval.lpips, plan.device)
    return {
        "load": _loading(needs.folder, needs.weights + needs.others, needs.device),
        "quantize": _quantizing(needs),
        "compare": measured * (3 if floors else 1) * comparing * scale,
        "write": measured * _writing(frames, side, settings.fps, 3 if floors else 2) * scale,
    }


def _video(frames: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).random((frames, side, side, 3), dtype=np.float32)


@once
def _comparing(frames: int, side: int, prompt: str | None, lpips: str, device: torch.device) -> float:
    """Of a pair of videos; with a ``prompt`` of tiny-wan's attributes are looked for too."""
    video, network = _video(frames, side), distance(lpips, device)
    a, b = (Sample(prompt or "", 0, torch.zeros(1), changed) for changed in (video, 0.9 * video))
    return _seconds(lambda: of_pair(b, a, prompt is not None, network))


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
def _loading(folder: Path, size: int, device: torch.device) -> float:
    """By loading it, where that is small and there; else nothing is known of the disk, and nothing counted."""
    if size > LOADED or not any(folder.glob("transformer/*.safetensors")):
        return 0.0
    return _seconds(lambda: load_pipeline(folder, str(device)))


def _quantizing(needs: ResourceEstimate) -> float:
    """All linears, by the first of them or as much of it as is probed; in proportion to their weights."""
    if not needs.converted:
        return 0.0
    linear = needs.shape.get_submodule(needs.converted[0])
    assert isinstance(linear, nn.Linear)
    rows = max(1, min(linear.out_features, WEIGHTS // linear.in_features))
    each = _quantizing_one(linear.in_features, rows, needs.scheme, needs.device)
    small = linear.weight.numel() <= WEIGHTS
    return each * (len(needs.converted) if small else needs.quantized_weights / (rows * linear.in_features))


@once
def _quantizing_one(columns: int, rows: int, scheme: Scheme, device: torch.device) -> float:
    alone = replace(scheme.config, attention="off")  # which needs three linears
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
    return _seconds(lambda: quantize_(root(), alone, (), (), {PROBE: seen}))


def _seconds(run: Callable[[], object]) -> float:
    """Of the second call: the first is for warmth."""
    run()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
