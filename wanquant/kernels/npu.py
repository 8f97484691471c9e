"""The kernels of Ascend NPUs: the chip's own HiF8 cast and quantized product where it has them, by trial.

Which chips have them (Ascend 950, not 910B) and whether their cast overflows to infinity or saturates is not read off
a name: each cast is tried once, on every BF16 pattern or on the float32 values beside every tie and many others, and
used only if all of its codes are those of the format's definition. Everything else runs on the eager integer path,
which is exact on any chip; a warning says so and why.

Written against the signatures in the ``torch_npu`` 2.14 wheel (a test reads them where it is installed) and not run
on hardware. ``torch_npu`` is imported by the first tensor on an NPU.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

import torch

from wanquant.kernels import eager

#: What torch and torch_npu raise for a call they or the chip do not have.
_ABSENT = (RuntimeError, AttributeError, TypeError, ImportError)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    if casts_exactly(x.device, x.dtype, saturate):
        return _cast(x)
    return eager.encode_hif8(x, saturate)


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    if casts_exactly(x.device, x.dtype, saturate):
        return eager.decode_hif8(_cast(x), x.dtype)
    return eager.round_hif8(x, saturate)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    out.copy_(round_hif8(x, saturate))


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not casts_exactly(x.device, torch.float32, saturate):
        return eager.scaled_round_hif8(x, scale, saturate, factors)
    scaled = eager.times(x, factors) / (scale[:, None] if scale.ndim else scale)
    return eager.decode_hif8(_cast(scaled), torch.bfloat16), (scaled.abs() >= eager.OVERFLOW).sum()


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = eager.times(x, factors)
    scale = eager.absmax_to_scale(eager.absmax_rows(x), goal, power_of_two)
    return scaled_round_hif8(x, scale, saturate)[0], scale


@cache
def casts_exactly(device: torch.device, dtype: torch.dtype, saturate: bool) -> bool:
    """Whether the chip's cast from this type gives the codes of the definition for all of ``trial_inputs``."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    inputs = trial_inputs(dtype)
    try:
        wrong = int((_cast(inputs.to(device)).cpu() != eager.encode_hif8(inputs, saturate)).sum())
        why = f"its cast gives another code for {wrong} of {len(inputs)} inputs"
    except torch.OutOfMemoryError:
        raise
    except _ABSENT as error:  # no such cast on this chip, or in this torch_npu
        wrong, why = 1, f"{type(error).__name__}: {error}".partition("\n")[0]
    if wrong:
        kind = f"{str(dtype).removeprefix('torch.')}{', saturating,' if saturate else ''}"
        warnings.warn(f"HiF8 from {kind} on {device} runs on the slower integer path: {why}", stacklevel=2)
    return not wrong


def trial_inputs(dtype: torch.dtype) -> torch.Tensor:
    """Every BF16 pattern; of float32 also what lies just beside every tie, which a cast by way of BF16 would round
    twice, and 2^16 random patterns."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if dtype == torch.bfloat16:
        return patterns
    values = eager.decode_hif8(torch.arange(256), torch.float32)
    values = values[values.isfinite()].sort().values
    ties = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([eager.OVERFLOW, -eager.OVERFLOW])])
    beside = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (-torch.inf, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, dtype=torch.int32).view(torch.float32)
    return torch.cat([patterns.float(), ties, *beside, random])


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
    except torch.OutOfMemoryError:
        raise
    except _ABSENT:
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
