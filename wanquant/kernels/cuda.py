"""The kernels of CUDA, in Triton, one function per op.

Tested bit for bit under Triton's interpreter, and, because that lets pass what does not compile, compiled for each kind
of card in each specialization. BF16 is read and written as its bits, because a card's cast makes another NaN than
torch's on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wanquant.kernels.eager import fit
from wanquant.kernels.tables import decode_table, encode_table, narrow

_BLOCK = 1024


@triton.jit
def _round_bits(bits, saturate: tl.constexpr):
    """HiF8 rounding of float32 patterns (int32), as ``wanquant.kernels.eager.round_float32``."""
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23) - 127
    distance = tl.where(exponent < 0, -exponent, exponent)
    drop = 20 + (distance > 3).to(tl.int32) + (distance > 7).to(tl.int32) + (distance > 15).to(tl.int32)
    one = tl.full(bits.shape, 1, tl.int32)
    rounded = ((magnitude + (one << (drop - 1))) >> drop) << drop
    rounded = tl.where(magnitude < 104 << 23, 0, tl.maximum(rounded, 105 << 23))
    over = (rounded > 142 << 23) & (magnitude != 0x7F800000)
    rounded = tl.where(over, (142 << 23) if saturate else 0x7F800000, rounded)
    signed = tl.where(rounded == 0, 0, rounded | (bits & -0x80000000))
    return tl.where(magnitude > 0x7F800000, 0x7FC00000, signed)


@triton.jit
def _widen(values, is_bfloat16: tl.constexpr):
    """int16 patterns of BF16, or int32 ones of float32, to int32 ones of float32."""
    if is_bfloat16:
        return values.to(tl.int32) << 16
    else:  # without it both returns are compiled, and their types differ
        return values


@triton.jit
def _round_kernel(x, y, count, is_bfloat16: tl.constexpr, saturate: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rounded = _round_bits(_widen(tl.load(x + at, at < count, 0), is_bfloat16), saturate)
    if is_bfloat16:
        rounded = (rounded >> 16).to(tl.int16)
    tl.store(y + at, rounded, at < count)


@triton.jit
def _encode_kernel(x, y, table, count, is_bfloat16: tl.constexpr, saturate: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rounded = _round_bits(_widen(tl.load(x + at, at < count, 0), is_bfloat16), saturate)
    tl.store(y + at, tl.load(table + ((rounded >> 20) & 0xFFF)), at < count)


@triton.jit
def _decode_kernel(x, y, table, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(table + tl.load(x + at, at < count, 0).to(tl.int32)), at < count)


@triton.jit
def _scale_of(absmax_bits, goal, power_of_two: tl.constexpr):
    """As ``wanquant.kernels.eager.absmax_to_scale``, from the pattern of the absmax."""
    scale = tl.div_rn(absmax_bits.to(tl.float32, bitcast=True), goal)
    if power_of_two:
        bits = scale.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFFF) & 0x7F800000
        # A subnormal's pattern counts units of 2^-149; the power of two above the count is one bit of that pattern.
        count = bits.to(tl.float32).to(tl.int32, bitcast=True)
        above = ((count + 0x7FFFFF) >> 23) - 127
        one = tl.full(bits.shape, 1, tl.int32)
        bits = tl.where(bits < 1 << 23, one << tl.maximum(above, 0), normal)
        scale = tl.where(scale == 0, scale, bits.to(tl.float32, bitcast=True))
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(absmax_bits < 0x7F800000, scale, float("nan"))


@triton.jit
def _factored(bits, factors, at, columns, has_factors: tl.constexpr):
    """float32 of the patterns, each column times its factor."""
    values = bits.to(tl.float32, bitcast=True)
    if has_factors:
        values *= tl.load(factors + at, at < columns, 0)
    return values


@triton.jit
def _quantize_kernel(
    x,
    y,
    scales,
    factors,
    columns,
    goal,
    has_factors: tl.constexpr,
    is_bfloat16: tl.constexpr,
    power_of_two: tl.constexpr,
    saturate: tl.constexpr,
    block: tl.constexpr,
):
    """A program a row: its absmax, then its rounding."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([block], tl.int32)
    for first in range(0, columns, block):
        at = first + tl.arange(0, block)
        bits = _widen(tl.load(x + row * columns + at, at < columns, 0), is_bfloat16)
        values = _factored(bits, factors, at, columns, has_factors)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = _scale_of(tl.max(largest, 0), goal, power_of_two)
    tl.store(scales + row, scale)
    for first in range(0, columns, block):
        at = first + tl.arange(0, block)
        bits = _widen(tl.load(x + row * columns + at, at < columns, 0), is_bfloat16)
        values = _factored(bits, factors, at, columns, has_factors)
        scaled = tl.div_rn(values, scale).to(tl.int32, bitcast=True)
        tl.store(y + row * columns + at, (_round_bits(scaled, saturate) >> 16).to(tl.int16), at < columns)


@triton.jit
def _scaled_kernel(
    x,
    y,
    scales,
    factors,
    over,
    columns,
    per_row: tl.constexpr,
    has_factors: tl.constexpr,
    is_bfloat16: tl.constexpr,
    saturate: tl.constexpr,
    block: tl.constexpr,
):
    """A program a row; ``over`` [rows] counts what overflowed."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + (row if per_row else 0))
    beyond = tl.zeros([block], tl.int64)
    for first in range(0, columns, block):
        at = first + tl.arange(0, block)
        bits = _widen(tl.load(x + row * columns + at, at < columns, 0), is_bfloat16)
        values = _factored(bits, factors, at, columns, has_factors)
        scaled = tl.div_rn(values, scale).to(tl.int32, bitcast=True)
        magnitude = scaled & 0x7FFFFFFF
        overflowed = (magnitude >= 0x47200000) & (magnitude <= 0x7F800000)
        beyond += (overflowed & (at < columns)).to(tl.int64)
        tl.store(y + row * columns + at, (_round_bits(scaled, saturate) >> 16).to(tl.int16), at < columns)
    tl.store(over + row, tl.sum(beyond, 0))


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty_like(source)
    if source.numel():
        _round_kernel[_grid(source)](_bits(source), _bits(out), source.numel(), _is16(source), saturate, _BLOCK)
    return out if out.dtype == x.dtype else narrow(out, x.dtype)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    source = fit(x)
    if out.is_contiguous() and out.dtype == source.dtype and source.numel():
        _round_kernel[_grid(source)](_bits(source), _bits(out), source.numel(), _is16(source), saturate, _BLOCK)
    else:
        out.copy_(round_hif8(x, saturate))


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty(source.shape, dtype=torch.uint8, device=x.device)
    if source.numel():
        table = encode_table(x.device)
        _encode_kernel[_grid(source)](_bits(source), out, table, source.numel(), _is16(source), saturate, _BLOCK)
    return out


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        table = _bits(decode_table(dtype, codes.device))
        _decode_kernel[_grid(codes)](codes, _bits(out), table, codes.numel(), _BLOCK)
    return out


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = fit(x)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        given = (scale if factors is None else factors, x.shape[1], goal, factors is not None)
        _quantize_kernel[(x.shape[0],)](_bits(x), _bits(out), scale, *given, _is16(x), power_of_two, saturate, _BLOCK)
    return out, scale


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = fit(x), scale.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    over = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    if x.shape[0]:
        given = (scale, scale if factors is None else factors, over, x.shape[1], bool(scale.ndim), factors is not None)
        _scaled_kernel[(x.shape[0],)](_bits(x), _bits(out), *given, _is16(x), saturate, _BLOCK)
    return out, over.sum()


def _is16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int16 if x.element_size() == 2 else torch.int32)


def _grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)
