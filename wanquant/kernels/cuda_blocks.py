"""The kernel of CUDA that rounds matrices whose blocks share a scale: ``wanquant.kernels.blocks`` in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from wanquant.kernels import blocks
from wanquant.kernels.cuda_bits import bfloat16, is16, pattern, widen
from wanquant.kernels.eager import fit

#: Elements a program.
_ELEMENTS = 2048
_BF16, _E8M0, _HIF4 = (tl.constexpr(kind) for kind in (blocks.SCALE_BF16, blocks.SCALE_E8M0, blocks.SCALE_HIF4))
_LARGEST_SCALE, _SMALLEST_LEVEL = tl.constexpr(blocks.LARGEST_SCALE), tl.constexpr(blocks.SMALLEST_LEVEL)
_LARGEST_LEVEL, _SEVENTH = tl.constexpr(blocks.LARGEST_LEVEL), tl.constexpr(blocks.SEVENTH)


@triton.jit
def _to_grid(magnitude, mantissa: tl.constexpr, least: tl.constexpr, largest):
    """``round_element``: a number of 1.5 · 2^23 steps is added and taken away, which leaves whole steps."""
    magnitude = tl.minimum(magnitude, largest)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, (127 + least) << 23)
    steps = ((exponent + ((23 - mantissa) << 23)) | 0x00400000).to(tl.float32, bitcast=True)
    return (magnitude + steps) - steps


@triton.jit
def _through_bfloat16(values):
    return (bfloat16(values).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _block_scale(absmax, largest, kind: tl.constexpr, top: tl.constexpr):
    """Of the largest magnitudes of blocks; 0 where all of a block becomes 0."""
    if kind == _E8M0:  # 2^-127, the least, is subnormal
        field = tl.maximum((absmax.to(tl.int32, bitcast=True) >> 23) - top, 0)
        return tl.where(field > 0, field << 23, 0x00400000).to(tl.float32, bitcast=True)
    else:
        wanted = tl.div_rn(absmax, largest)
        if kind == _BF16:
            return _through_bfloat16(wanted)
        else:
            return _to_grid(wanted, 3, -6, _LARGEST_SCALE)


@triton.jit
def _by_scale(magnitude, absmax, largest, kind: tl.constexpr, mantissa: tl.constexpr, least: tl.constexpr,
              top: tl.constexpr):  # fmt: skip
    """Magnitudes [count, block] of elements times their scale."""
    scale = _block_scale(absmax, largest, kind, top)[:, None] + tl.zeros_like(magnitude)
    rounded = _to_grid(tl.div_rn(magnitude, scale), mantissa, least, largest) * scale
    return tl.where(scale == 0, 0.0, rounded)


@triton.jit
def _by_levels(magnitude, absmax, count: tl.constexpr):
    """HiF4's of magnitudes [count, 64]."""
    wanted = tl.maximum(_through_bfloat16(absmax * _SEVENTH), _SMALLEST_LEVEL)
    level = _to_grid(wanted, 2, -48, _LARGEST_LEVEL)[:, None, None, None]
    reciprocal = _through_bfloat16(tl.div_rn(tl.full(level.shape, 1.0, tl.float32), level))
    within = tl.reshape(magnitude, [count, 8, 2, 4])
    fours = tl.max(within, 3, keep_dims=True)
    second = tl.max(fours, 2, keep_dims=True) * reciprocal >= 4.0
    third = fours * reciprocal * tl.where(second, 0.5, 1.0) >= 2.0
    power = tl.where(second, 2.0, 1.0) * tl.where(third, 2.0, 1.0)
    by = reciprocal * tl.where(second, 0.5, 1.0) * tl.where(third, 0.5, 1.0)  # powers of two, so exact
    quarters = tl.minimum(within * by * 4.0 + 0.5, 7.0).to(tl.int32).to(tl.float32)
    return tl.reshape(quarters * (level * power * 0.25), [count, 64])


@triton.jit
def _round_blocks_kernel(
    x, y, scales, factors, over, blocks_in_all, blocks_of_row, largest, limit,
    per_row: tl.constexpr, has_factors: tl.constexpr, is_bfloat16: tl.constexpr, kind: tl.constexpr,
    mantissa: tl.constexpr, least: tl.constexpr, top: tl.constexpr, block: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """``count`` blocks a program; ``over`` holds how many elements of a program overflow."""
    number = tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)
    within = tl.arange(0, block)[None, :]
    inside = (number < blocks_in_all)[:, None]
    at = number[:, None] * block + within
    values = widen(tl.load(x + at, inside, 0), is_bfloat16).to(tl.float32, bitcast=True)
    if has_factors:
        values *= tl.load(factors + (number % blocks_of_row)[:, None] * block + within)
    if per_row:
        scale = tl.load(scales + number // blocks_of_row, number < blocks_in_all, 1.0)[:, None]
    else:
        scale = tl.load(scales)
    values = tl.div_rn(values, scale + tl.zeros_like(values))
    magnitude = tl.abs(values)
    tl.store(over + tl.program_id(0), tl.sum(tl.sum(((magnitude >= limit) & inside).to(tl.int32), 1), 0))
    highest = tl.max(magnitude.to(tl.int32, bitcast=True), 1)  # whole numbers, of which NaN are the largest
    absmax = highest.to(tl.float32, bitcast=True)
    if kind == _HIF4:
        rounded = _by_levels(magnitude, absmax, count)
    else:
        rounded = _by_scale(magnitude, absmax, largest, kind, mantissa, least, top)
    bits = bfloat16(rounded)
    sign = ((values.to(tl.int32, bitcast=True) >> 16) & 0x8000).to(tl.int16)
    if kind == _BF16:  # whole numbers have one zero
        sign = tl.where(bits == 0, 0, sign)
    tl.store(y + at, tl.where((highest < 0x7F800000)[:, None], bits | sign, 0x7FC0), inside)


def round_blocks(
    x: torch.Tensor,
    scale: torch.Tensor,
    block: int,
    kind: int,
    mantissa: int,
    exponent: int,
    largest: float,
    limit: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = fit(x), scale.contiguous()
    out, count = torch.empty_like(x, dtype=torch.bfloat16), _ELEMENTS // block
    programs = triton.cdiv(x.numel(), _ELEMENTS)
    over = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        given = (scale, scale if factors is None else factors.contiguous(), over, x.numel() // block)
        how = (bool(scale.ndim), factors is not None, is16(x), kind, mantissa, exponent, math.frexp(largest)[1] - 1)
        _round_blocks_kernel[(programs,)](
            pattern(x), pattern(out), *given, x.shape[1] // block, largest, limit, *how, block, count,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, over.sum()
