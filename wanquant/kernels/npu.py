"""The kernels of Ascend NPUs: the chip's own HiF8 cast and quantized product where it has them, by trial.

Which chips have them (Ascend 950, not 910B) and whether their cast overflows to infinity or saturates is not read off
a name: each call is tried once on every BF16 pattern and used only if all of its codes are those of the format's
definition. Everything else runs on the eager integer path, which is exact on any chip.

Written against the signatures in the ``torch_npu`` 2.14 wheel (a test reads them where it is installed) and not run
on hardware. ``torch_npu`` is imported by the first tensor on an NPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from wanquant.kernels import eager


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    if x.dtype != torch.float16 and casts_exactly(x.device, saturate):
        return _cast(x)
    return eager.encode_hif8(x, saturate)


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    if x.dtype != torch.float16 and casts_exactly(x.device, saturate):
        return eager.decode_hif8(_cast(x), x.dtype)
    return eager.round_hif8(x, saturate)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    out.copy_(round_hif8(x, saturate))


def scaled_round_hif8(x: torch.Tensor, scale: torch.Tensor, saturate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not casts_exactly(x.device, saturate):
        return eager.scaled_round_hif8(x, scale, saturate)
    scaled = x.float() / (scale[:, None] if scale.ndim else scale)
    return eager.decode_hif8(_cast(scaled), torch.bfloat16), (scaled.abs() >= eager.OVERFLOW).sum()


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = eager.step(eager.absmax_rows(x), goal, power_of_two)
    return scaled_round_hif8(x, scale, saturate)[0], scale


@cache
def casts_exactly(device: torch.device, saturate: bool) -> bool:
    """Whether the chip's cast gives the code of the definition for every BF16 pattern, as BF16 and as float32."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    expected = eager.encode_hif8(patterns, saturate)
    try:
        return all(torch.equal(_cast(x.to(device)).cpu(), expected) for x in (patterns, patterns.float()))
    except (RuntimeError, AttributeError, TypeError, ImportError):
        return False  # no such cast on this chip, or in this torch_npu


@cache
def multiplies(device: torch.device) -> bool:
    """Whether the chip's product of codes is that of their values, to a BF16 unit, on a small example."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator) * 4 for n in (32, 48))
    row_scale, column_scale = torch.rand(32, generator=generator) + 0.5, torch.rand(48, generator=generator) + 0.5
    bias = torch.randn(48, generator=generator)
    codes = [eager.encode_hif8(part, False) for part in (x, w)]
    values = [eager.decode_hif8(part, torch.float32).double() for part in codes]
    expected = values[0] @ values[1].T * row_scale[:, None] * column_scale + bias
    x_codes, w_codes, row_scale, column_scale, bias = (
        tensor.to(device) for tensor in (*codes, row_scale, column_scale, bias)
    )
    try:
        got = multiply(x_codes, w_codes, row_scale, column_scale, bias, torch.bfloat16).cpu().double()
    except (RuntimeError, AttributeError, TypeError, ImportError):
        return False
    return bool(torch.allclose(got, expected, rtol=2**-7, atol=2**-6))


def _cast(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes; torch has no HiF8 dtype, so the chip's goes by torch_npu's number for it."""
    npu = _npu()
    codes: torch.Tensor = npu.npu_dtype_cast(x.contiguous(), npu.hifloat8)
    return codes.view(torch.uint8)


def multiply(
    codes: torch.Tensor,
    weight_codes: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The chip's product of uint8 codes [rows, k] and [columns, k], scaled and biased: [rows, columns]."""
    npu = _npu()
    product: torch.Tensor = npu.npu_quant_matmul(
        codes,
        weight_codes.T,
        column_scale.reshape(-1),
        pertoken_scale=row_scale.expand(len(codes)).contiguous(),
        bias=None if bias is None else bias.float(),
        output_dtype=dtype,
        x1_dtype=npu.hifloat8,
        x2_dtype=npu.hifloat8,
    )
    return product


def _npu() -> Any:
    return importlib.import_module("torch_npu")
