"""``dry_run=true``: what a run would do, and what it would need, from the shapes alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from wanquant.ptq.protect import ProtectConfig
from wanquant.quant import ConversionReport, QuantConfig, plan_conversion
from wanquant.quant.config import parse
from wanquant.wan.experts import shape_of_whole
from wanquant.wan.generate import GenerationConfig
from wanquant.wan.load import Transformer
from wanquant.wan.products import quick_products

LEGEND = "P = protected, stays BF16; q = quantized; m = some of it quantized; - = nothing of it quantized"


@dataclass(frozen=True)
class Plan:
    """Predicted for one transformer: bytes of its weights, and seconds of matrix products a video."""

    report: ConversionReport
    parameters: int
    bf16_bytes: int
    packed_bytes: int
    seconds_per_video: float


def make_plan(folder: Path, quant: QuantConfig, protect: ProtectConfig, settings: GenerationConfig) -> Plan:
    """From ``transformer/config.json`` alone: no weight is read."""
    transformer = shape_of_whole(folder)
    scheme = parse(quant)
    report = plan_conversion(transformer, quant, protect.blocks, protect.modules)
    parameters = sum(p.numel() for p in transformer.parameters())
    weights = scales = 0
    for name in report.names("converted"):
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weights += linear.weight.numel()
        scales += math.prod(scheme.weight_granularity.scale_shape(linear.out_features, linear.in_features))
    tokens, width = tokens_of(settings, transformer), transformer.proj_out.in_features
    forward = 2 * tokens * parameters + 4 * tokens**2 * width * report.blocks
    branches = 2 if settings.guidance_scale > 1 else 1
    seconds = branches * settings.steps * forward / _gemm_rate(width)
    return Plan(report, parameters, 2 * parameters, 2 * parameters - weights + 4 * scales, seconds)


def print_plan(
    config_yaml: str,
    folder: Path,
    quant: QuantConfig,
    protect: ProtectConfig,
    settings: GenerationConfig,
    videos: int,
) -> None:
    """``videos`` counts all that would be generated: calibration, BF16, noise floor, quantized."""
    plan = make_plan(folder, quant, protect, settings)
    counts = plan.report.counts()
    seconds = plan.seconds_per_video * videos
    print(config_yaml)
    print(f"blocks      {block_map(plan.report)}   ({LEGEND})")
    print("linears     " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    print(f"transformer {plan.parameters:,} parameters, {in_bytes(plan.bf16_bytes)} in BF16")
    print(f"checkpoint  transformer {in_bytes(plan.packed_bytes)}, {plan.packed_bytes / plan.bf16_bytes:.2f} of BF16")
    print(f"memory      {in_bytes(plan.bf16_bytes)} for its weights; text encoder, VAE and activations come on top")
    print(f"time        {max(1, seconds):,.0f} s at least: matrix products of {videos} videos at this CPU's BF16 rate")


def block_map(report: ConversionReport) -> str:
    """One letter a block: ``PPqq...qqPPP``."""
    found: dict[int, set[str]] = {index: set() for index in range(report.blocks)}
    for module in report.modules:
        if module.block is not None:
            found[module.block].add(module.status)

    def letter(index: int, statuses: set[str]) -> str:
        if index in report.protected_blocks:
            return "P"
        return "q" if statuses == {"converted"} else "m" if "converted" in statuses else "-"

    return "".join(letter(index, statuses) for index, statuses in found.items())


def tokens_of(settings: GenerationConfig, transformer: Transformer) -> int:
    """Tokens of one video: latents are 4×8×8 smaller, patches take another 1×2×2."""
    frames = (settings.num_frames - 1) // 4 + 1
    patch = transformer.config.patch_size
    return int(frames // patch[0] * (settings.height // 8 // patch[1]) * (settings.width // 8 // patch[2]))


def _gemm_rate(width: int, tokens: int = 512) -> float:
    """FLOPs a second of a BF16 product at the model's width, measured for about a quarter of a second."""
    a, b = torch.randn(tokens, width).to(torch.bfloat16), torch.randn(width, width).to(torch.bfloat16)
    with quick_products(a.device):
        F.linear(a, b)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.25:
            F.linear(a, b)
            count += 1
    return 2 * tokens * width * width * count / (time.perf_counter() - begun)


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
