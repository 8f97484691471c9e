"""The kernels of CUDA that go row by row through a matrix: what a quantized linear does besides its product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wanquant.kernels.cuda_bits import (
    bfloat16,
    carried,
    count_lost,
    e4m3,
    factored,
    is16,
    pattern,
    round_bits,
    scale_of,
    widen,
)
from wanquant.kernels.eager import CODED_E4M3, CODED_HIF8, CODED_INT8, fit
from wanquant.kernels.tables import narrow, round_table

#: Columns that a program holds in registers; rows of more are read twice.
_WHOLE = 1 << 14
_BLOCK = 1024
#: Of what is descaled: rows and columns a program.
_ROWS, _COLUMNS = 8, 256
#: What a kernel writes: HiF8 as BF16, or codes that an 8-bit product takes.
_BF16 = tl.constexpr(-1)
_HIF8, _E4M3, _INT8 = tl.constexpr(CODED_HIF8), tl.constexpr(CODED_E4M3), tl.constexpr(CODED_INT8)


@triton.jit
def _placed(values, scale, table, lift, kind: tl.constexpr, saturate: tl.constexpr):
    """values / scale as what is stored, and where that is another value than the format's."""
    scaled = tl.div_rn(values, scale)
    known = scaled == scaled
    if kind == _INT8:
        whole = (scaled + 12582912.0) - 12582912.0  # to nearest, ties to even
        placed = tl.where(known, tl.minimum(tl.maximum(whole, -127.0), 127.0), 0.0).to(tl.int8)
        return placed.to(tl.uint8, bitcast=True), scaled != scaled
    elif kind == _E4M3:
        code, _ = e4m3(tl.minimum(tl.maximum(scaled, -448.0), 448.0))
        return tl.where(known, code, 0x7F), scaled != scaled
    else:
        rounded = round_bits(scaled.to(tl.int32, bitcast=True), table, saturate)
        if kind == _BF16:
            return (rounded >> 16).to(tl.int16), scaled != scaled
        else:
            code, lost = carried(rounded.to(tl.float32, bitcast=True) * lift)
            return code, lost


@triton.jit
def _values(x, factors, row, at, columns, has_factors: tl.constexpr, is_bfloat16: tl.constexpr):
    """A part of a row in float32, each column times its factor."""
    bits = widen(tl.load(x + row * columns + at, at < columns, 0), is_bfloat16)
    return factored(bits, factors, at, columns, has_factors)


@triton.jit
def _magnitude(values):
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quantize_kernel(
    x, y, scales, lost, factors, table, columns, goal, lift, divisor,
    has_factors: tl.constexpr, is_bfloat16: tl.constexpr, power_of_two: tl.constexpr, saturate: tl.constexpr,
    kind: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program a row, by the scale of its absmax; ``lost`` counts what the codes do not hold, and all."""
    row = tl.program_id(0).to(tl.int64)
    if whole:
        at = tl.arange(0, block)
        values = _values(x, factors, row, at, columns, has_factors, is_bfloat16)
        scale = scale_of(tl.max(_magnitude(values), 0), goal, power_of_two)
        placed, gone = _placed(values, scale, table, lift, kind, saturate)
        tl.store(y + row * columns + at, placed, at < columns)
        missing = tl.sum((gone & (at < columns)).to(tl.int32), 0)
    else:
        largest = tl.zeros([block], tl.int32)
        for first in range(0, columns, block):
            at = first + tl.arange(0, block)
            values = _values(x, factors, row, at, columns, has_factors, is_bfloat16)
            largest = tl.maximum(largest, _magnitude(values))
        scale = scale_of(tl.max(largest, 0), goal, power_of_two)
        counted = tl.zeros([block], tl.int32)
        for first in range(0, columns, block):
            at = first + tl.arange(0, block)
            values = _values(x, factors, row, at, columns, has_factors, is_bfloat16)
            placed, gone = _placed(values, scale, table, lift, kind, saturate)
            tl.store(y + row * columns + at, placed, at < columns)
            counted += (gone & (at < columns)).to(tl.int32)
        missing = tl.sum(counted, 0)
    if kind != _BF16:
        count_lost(lost, missing if kind == _HIF8 else 0 * missing, tl.num_programs(0).to(tl.int64) * columns)
        scale /= divisor  # a power of two
    tl.store(scales + row, scale)


@triton.jit
def _scaled_kernel(
    x,
    y,
    scales,
    factors,
    over,
    table,
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
    beyond = tl.zeros([block], tl.int32)
    for first in range(0, columns, block):
        at = first + tl.arange(0, block)
        bits = widen(tl.load(x + row * columns + at, at < columns, 0), is_bfloat16)
        scaled = tl.div_rn(factored(bits, factors, at, columns, has_factors), scale).to(tl.int32, bitcast=True)
        magnitude = scaled & 0x7FFFFFFF
        overflowed = (magnitude >= 0x47200000) & (magnitude <= 0x7F800000)
        beyond += (overflowed & (at < columns)).to(tl.int32)
        rounded = round_bits(scaled, table, saturate)
        tl.store(y + row * columns + at, (rounded >> 16).to(tl.int16), at < columns)
    tl.store(over + row, tl.sum(beyond, 0))


@triton.jit
def _descale_kernel(
    product,
    y,
    row_scales,
    column_scales,
    bias,
    rows,
    columns,
    per_row: tl.constexpr,
    per_column: tl.constexpr,
    has_bias: tl.constexpr,
    is_bfloat16: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """A tile a program: product · row scale · column scale + bias, each operation rounded by itself."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = tl.load(product + at, inside, 0).to(tl.float32)
    if per_row:
        values *= tl.load(row_scales + row, row < rows, 0)[:, None]
    else:
        values *= tl.load(row_scales)
    if per_column:
        values *= tl.load(column_scales + column, column < columns, 0)[None, :]
    else:
        values *= tl.load(column_scales)
    if has_bias:
        values += tl.load(bias + column, column < columns, 0).to(tl.float32)[None, :]
    if is_bfloat16:
        tl.store(y + at, bfloat16(values), inside)
    else:
        tl.store(y + at, tl.where(values == values, values.to(tl.int32, bitcast=True), 0x7FC00000), inside)


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    scale, _ = _quantize(fit(x), out, goal, power_of_two, saturate, -1, 1.0, 1.0, factors)
    return out, scale


def quantize_rows_coded(
    x: torch.Tensor,
    kind: int,
    goal: float,
    power_of_two: bool,
    lift: float,
    divisor: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale, lost = _quantize(fit(x), out, goal, power_of_two, False, kind, lift, divisor, factors)
    return out, scale, lost


def _quantize(
    x: torch.Tensor,
    out: torch.Tensor,
    goal: float,
    power_of_two: bool,
    saturate: bool,
    kind: int,
    lift: float,
    divisor: float,
    factors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    lost = scale if kind < 0 else torch.zeros(2, dtype=torch.int64, device=x.device)
    whole = columns <= _WHOLE
    block = max(32, triton.next_power_of_2(columns)) if whole else _BLOCK
    if rows:
        given = (scale, lost, scale if factors is None else factors.contiguous(), round_table(saturate, x.device))
        how = (factors is not None, is16(x), power_of_two, saturate, kind, whole, block)
        warps = min(16, max(1, block // 1024))
        _quantize_kernel[(rows,)](pattern(x), pattern(out), *given, columns, goal, lift, divisor, *how, num_warps=warps)
    return scale, lost


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale = fit(x), scale.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    over = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    if x.shape[0]:
        given = (
            scale,
            scale if factors is None else factors.contiguous(),
            over,
            round_table(saturate, x.device),
            x.shape[1],
        )
        how = (bool(scale.ndim), factors is not None, is16(x), saturate, _BLOCK)
        _scaled_kernel[(x.shape[0],)](pattern(x), pattern(out), *given, *how)
    return out, over.sum()


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype == torch.float16:
        return narrow(descale(product, row_scale, column_scale, bias, torch.float32), dtype)
    product, (rows, columns) = product.contiguous(), product.shape
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    if out.numel():
        scales = (row_scale.contiguous(), column_scale.contiguous())
        given = (*scales, scales[0] if bias is None else bias.contiguous(), rows, columns)
        how = (bool(row_scale.ndim), bool(column_scale.ndim), bias is not None, is16(out), _ROWS, _COLUMNS)
        tiles = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
        # Fused, a product and a sum would be rounded once, and not as on other devices.
        _descale_kernel[tiles](product, pattern(out), *given, *how, enable_fp_fusion=False)
    return out
