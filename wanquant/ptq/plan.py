"""``dry_run=true``: what a run would do, and what it would need, from the shapes alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanquant.ptq.protect import ProtectConfig
from wanquant.quant import ConversionReport, QuantConfig, plan_conversion
from wanquant.quant.config import parse
from wanquant.wan.generate import GenerationConfig
from wanquant.wan.load import empty_transformer

LEGEND = "P = protected, stays BF16; q = quantized"


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds predicted for one transformer."""

    report: ConversionReport
    parameters: int
    bf16_bytes: int
    packed_bytes: int
    seconds_per_video: float


def make_plan(folder: Path, quant: QuantConfig, protect: ProtectConfig, settings: GenerationConfig) -> Plan:
    """From ``transformer/config.json`` alone: no weight is read."""
    transformer = empty_transformer(folder)
    report = plan_conversion(transformer, protect.blocks, protect.modules)
    scheme = parse(quant)
    parameters = sum(p.numel() for p in transformer.parameters())
    weights = rows = 0
    for name in report.names("converted"):
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weights += linear.weight.numel()
        rows += linear.out_features
    packed = 2 * parameters - weights + 4 * rows * (scheme.format.bits // 8)
    tokens = _tokens(settings, transformer)
    flops = 2 * tokens * parameters * 2 * settings.steps
    return Plan(report, parameters, 2 * parameters, packed, flops / _gemm_rate(transformer.proj_out.in_features))


def print_plan(
    config_yaml: str,
    folder: Path,
    quant: QuantConfig,
    protect: ProtectConfig,
    settings: GenerationConfig,
    videos: int,
) -> None:
    plan = make_plan(folder, quant, protect, settings)
    counts = plan.report.counts()
    print(config_yaml)
    print(f"blocks      {block_map(plan.report)}   ({LEGEND})")
    print("linears     " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    print(f"transformer {plan.parameters:,} parameters, {_bytes(plan.bf16_bytes)} in BF16")
    print(f"checkpoint  {_bytes(plan.packed_bytes)} on disk ({plan.packed_bytes / plan.bf16_bytes:.2f} of BF16)")
    print(f"memory      at least {_bytes(plan.bf16_bytes)} for the weights, while both are generated with")
    print(f"time        at least {plan.seconds_per_video * videos:,.0f} s for {videos} videos, at this CPU's BF16 rate")


def block_map(report: ConversionReport) -> str:
    """One letter a block: ``PPqq...qqPPP``."""
    return "".join("P" if index in report.protected_blocks else "q" for index in range(report.blocks))


def _tokens(settings: GenerationConfig, transformer: WanTransformer3DModel) -> int:
    """Tokens of one video: latents are 4×8×8 smaller, patches take another 1×2×2."""
    frames = (settings.num_frames - 1) // 4 + 1
    patch = transformer.config.patch_size
    return int(frames // patch[0] * (settings.height // 8 // patch[1]) * (settings.width // 8 // patch[2]))


def _gemm_rate(width: int, tokens: int = 512) -> float:
    """FLOPs a second of a BF16 product at the model's width, measured for about a quarter of a second."""
    a, b = torch.randn(tokens, width).to(torch.bfloat16), torch.randn(width, width).to(torch.bfloat16)
    torch.mm(a, b)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.25:
        torch.mm(a, b)
        count += 1
    return 2 * tokens * width * width * count / (time.perf_counter() - begun)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
