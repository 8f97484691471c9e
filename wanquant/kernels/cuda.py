"""The kernels of CUDA, in Triton, one function per op; those of matrices are in ``cuda_rows`` and
``cuda_blocks``.

Tested bit for bit under Triton's interpreter, and, because that lets pass what does not compile, compiled for each kind
of card in each specialization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wanquant.kernels.cuda_bits import carried, count_lost, is16, pattern, round_bits, widen
from wanquant.kernels.cuda_blocks import round_blocks
from wanquant.kernels.cuda_rows import descale, quantize_rows_coded, quantize_rows_hif8, scaled_round_hif8
from wanquant.kernels.eager import fit
from wanquant.kernels.tables import decode_table, encode_table, narrow, round_table

__all__ = ["descale", "quantize_rows_coded", "quantize_rows_hif8", "round_blocks", "scaled_round_hif8"]

_BLOCK = 1024


@triton.jit
def _round_kernel(x, y, table, count, is_bfloat16: tl.constexpr, saturate: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rounded = round_bits(widen(tl.load(x + at, at < count, 0), is_bfloat16), table, saturate)
    if is_bfloat16:
        rounded = (rounded >> 16).to(tl.int16)
    tl.store(y + at, rounded, at < count)


@triton.jit
def _encode_kernel(
    x, y, rounding, codes, count, is_bfloat16: tl.constexpr, saturate: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rounded = round_bits(widen(tl.load(x + at, at < count, 0), is_bfloat16), rounding, saturate)
    tl.store(y + at, tl.load(codes + ((rounded >> 20) & 0xFFF)), at < count)


@triton.jit
def _decode_kernel(x, y, table, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(table + tl.load(x + at, at < count, 0).to(tl.int32)), at < count)


@triton.jit
def _carry_kernel(x, y, lost, count, lift, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    code, gone = carried(widen(tl.load(x + at, at < count, 0), True).to(tl.float32, bitcast=True) * lift)
    tl.store(y + at, code, at < count)
    count_lost(lost, tl.sum(gone.to(tl.int32), 0), count)


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty_like(source)
    _round_into(source, out, saturate)
    return out if out.dtype == x.dtype else narrow(out, x.dtype)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    source = fit(x)
    if out.is_contiguous() and out.dtype == source.dtype:
        _round_into(source, out, saturate)
    else:
        out.copy_(round_hif8(x, saturate))


def _round_into(source: torch.Tensor, out: torch.Tensor, saturate: bool) -> None:
    if source.numel():
        given = (round_table(saturate, source.device), source.numel(), is16(source), saturate, _BLOCK)
        _round_kernel[_grid(source)](pattern(source), pattern(out), *given)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty(source.shape, dtype=torch.uint8, device=x.device)
    if source.numel():
        tables = (round_table(saturate, x.device), encode_table(x.device))
        _encode_kernel[_grid(source)](pattern(source), out, *tables, source.numel(), is16(source), saturate, _BLOCK)
    return out


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return look_up(codes, decode_table(dtype, codes.device))


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    if codes.numel():
        _decode_kernel[_grid(codes)](codes, pattern(out), pattern(table), codes.numel(), _BLOCK)
    return out


def carry_e4m3(values: torch.Tensor, lift: float) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    lost = torch.zeros(2, dtype=torch.int64, device=values.device)
    if values.numel():
        _carry_kernel[_grid(values)](pattern(values), out, lost, values.numel(), lift, _BLOCK)
    return out, lost


def _grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)
