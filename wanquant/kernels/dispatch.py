"""Chooses a kernel by device and makes the tensor fit it: contiguous, flat, in a type it knows.

All functions are free of autograd and take float32, bfloat16 or float16.
"""

from __future__ import annotations

import torch

from wanquant.kernels import cpu, eager

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check(x: torch.Tensor, overflow: str) -> bool:
    """Refuses what no kernel computes exactly; returns whether an overflow saturates."""
    if x.dtype not in FLOATS:
        raise TypeError(f"HiF8 takes float32, bfloat16 or float16, not {x.dtype}")
    if overflow not in ("inf", "saturate"):
        raise ValueError(f"overflow must be 'inf' or 'saturate', not {overflow!r}")
    return overflow == "saturate"


def _compiled(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 0


@torch.no_grad()
def round_hif8(x: torch.Tensor, overflow: str = "inf", out: torch.Tensor | None = None) -> torch.Tensor:
    saturate = _check(x, overflow)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype} on {x.device}")
    if not _compiled(x):
        result = eager.round_any(x, saturate)
        return result if out is None else out.copy_(result)
    # float16 has subnormals where HiF8 has values, so it goes through float32, which is exact.
    source = x.float() if x.dtype == torch.float16 else x
    source = source.contiguous().view(-1)
    direct = out is not None and out.is_contiguous() and out.dtype == source.dtype
    target = out.view(-1) if direct and out is not None else torch.empty_like(source)
    cpu.round_any(source, target, saturate)
    if direct and out is not None:
        return out
    result = target.view(x.shape).to(x.dtype)
    return result if out is None else out.copy_(result)


@torch.no_grad()
def encode_hif8(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    saturate = _check(x, overflow)
    if not _compiled(x):
        return eager.encode(x, saturate)
    source = (x.float() if x.dtype == torch.float16 else x).contiguous().view(-1)
    out = torch.empty(source.shape, dtype=torch.uint8)
    cpu.encode(source, out, saturate)
    return out.view(x.shape)


@torch.no_grad()
def decode_hif8(codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    if codes.dtype != torch.uint8:
        raise TypeError(f"HiF8 codes are uint8, not {codes.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"HiF8 decodes to float32, bfloat16 or float16, not {dtype}")
    if not _compiled(codes):
        return eager.decode(codes, dtype)
    out = torch.empty(codes.numel(), dtype=dtype)
    cpu.decode(codes.contiguous().view(-1), out)
    return out.view(codes.shape)


@torch.no_grad()
def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of a matrix, float32 [rows]; NaN where the row holds one."""
    _check(x, "inf")
    if not _compiled(x) or x.dtype == torch.float16:
        return eager.absmax_rows(x)
    return cpu.absmax_rows(x.contiguous())


@torch.no_grad()
def scaled_round_hif8(x: torch.Tensor, scale: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    """round(x / scale) of a matrix [rows, columns] as BF16, the division in float32.

    ``scale`` is float32, [rows] or of no dimension. There is no BF16 step between the division and
    the rounding, so nothing is rounded twice.
    """
    saturate = _check(x, overflow)
    if not _compiled(x):
        return eager.scaled_round(x, scale, saturate)
    source = x.float() if x.dtype == torch.float16 else x
    return cpu.scaled_round(source.contiguous(), scale, saturate)
