"""What the other rooms call: arguments checked, then the op of the tensor's device (``wanquant.kernels.ops``).

All functions are free of autograd and take float32, bfloat16 or float16 of any layout.
"""

from __future__ import annotations

from typing import Any

import torch

from wanquant.kernels import npu
from wanquant.kernels import ops as _registered  # noqa: F401  torch.ops.wanquant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OPS: Any = torch.ops.wanquant


def _check_float(x: torch.Tensor) -> None:
    """Refuses what no kernel computes exactly."""
    if x.dtype not in FLOATS:
        raise TypeError(f"HiF8 takes float32, bfloat16 or float16, not {x.dtype}")


def _saturates(overflow: str) -> bool:
    if overflow not in ("inf", "saturate"):
        raise ValueError(f"overflow must be 'inf' or 'saturate', not {overflow!r}")
    return overflow == "saturate"


def _check_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Refuses what a kernel would read past the end of, or take for other numbers."""
    _check_float(x)
    if x.ndim != 2:
        raise ValueError(f"rows come as a matrix, not in the shape {tuple(x.shape)}")
    if scale is not None:
        _check_scale(scale, x.shape[0], "rows", x.device)


def _check_scale(scale: torch.Tensor, count: int, what: str, device: torch.device) -> None:
    if scale.dtype != torch.float32:
        raise TypeError(f"scales are float32, not {scale.dtype}")
    if scale.ndim > 1 or (scale.ndim and scale.shape[0] != count):
        raise ValueError(f"scales come as [{count}] for the {what} or as one number, not {tuple(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"scales are on {scale.device}, the values on {device}")


def _check_factors(x: torch.Tensor, factors: torch.Tensor | None) -> None:
    if factors is None:
        return
    if factors.ndim != 1:
        raise ValueError(f"factors come as [{x.shape[1]}] for the columns, not {tuple(factors.shape)}")
    _check_scale(factors, x.shape[1], "columns", x.device)


def round_hif8(x: torch.Tensor, overflow: str = "inf", out: torch.Tensor | None = None) -> torch.Tensor:
    _check_float(x)
    saturate = _saturates(overflow)
    if out is None:
        return _OPS.round_hif8.default(x, saturate)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype} on {x.device}")
    # Addresses are known only where something is computed.
    if out is not x and not torch.compiler.is_compiling() and not x.is_meta and _overlap(x, out):
        raise ValueError("out overlaps x: it may be x itself, or must lie elsewhere")
    _OPS.round_hif8_out.default(x, saturate, out)
    return out


def _overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether writing one element of ``out`` may change another of ``x``. False for two views of the same elements."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() or not x.numel():
        return False
    if x.data_ptr() == out.data_ptr() and x.stride() == out.stride():
        return False
    last_x, last_out = (sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in (x, out))
    first_x, first_out = x.storage_offset(), out.storage_offset()
    return bool(first_x <= first_out + last_out and first_out <= first_x + last_x)


def round_hif8_stochastic(
    x: torch.Tensor, generator: torch.Generator | None = None, overflow: str = "inf"
) -> torch.Tensor:
    """The random bits are drawn on the generator's device, so a CPU generator gives the same on every device."""
    _check_float(x)
    saturate = _saturates(overflow)
    device = x.device if generator is None else generator.device
    noise = torch.randint(-(2**31), 2**31, x.shape, generator=generator, device=device, dtype=torch.int32)
    return _OPS.round_hif8_stochastic.default(x, noise.to(x.device), saturate)


def encode_hif8(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    _check_float(x)
    return _OPS.encode_hif8.default(x, _saturates(overflow))


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    if codes.dtype != torch.uint8:
        raise TypeError(f"HiF8 codes are uint8, not {codes.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"HiF8 decodes to float32, bfloat16 or float16, not {dtype}")
    return _OPS.decode_hif8.default(codes, dtype)


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of a matrix, float32 [rows]; NaN where the row holds one."""
    _check_rows(x)
    return _OPS.absmax_rows.default(x)


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, overflow: str = "inf", factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """round(x / scale) of a matrix [rows, columns] as BF16, the division in float32; int64 [], how many overflowed.

    ``scale`` is float32, [rows] or of no dimension. There is no rounding to BF16 between the division and
    the rounding, so nothing is rounded twice. ``factors``, float32 [columns], powers of two, multiply x first.
    """
    _check_rows(x, scale)
    _check_factors(x, factors)
    return _OPS.scaled_round_hif8.default(x, scale, _saturates(overflow), factors)


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, overflow: str = "inf", factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_round_hif8`` by the scale of each row (``absmax_to_scale``), in one pass: BF16 [rows, columns], scales
    [rows].

    The absmax is that of the row times ``factors``.
    """
    _check_rows(x)
    _check_factors(x, factors)
    return _OPS.quantize_rows_hif8.default(x, goal, power_of_two, _saturates(overflow), factors)


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """product · row scale · column scale + bias in float32, rounded once to ``dtype``.

    ``product`` is [rows, columns]; the scales are float32, [rows] and [columns] or of no dimension.
    """
    _check_rows(product, row_scale)
    _check_scale(column_scale, product.shape[1], "columns", product.device)
    if bias is not None:
        _check_float(bias)
        if bias.shape != product.shape[1:] or bias.device != product.device:
            raise ValueError(f"the bias has to be [{product.shape[1]}] on {product.device}")
    if dtype not in FLOATS:
        raise TypeError(f"products are scaled to float32, bfloat16 or float16, not {dtype}")
    return _OPS.descale.default(product, row_scale, column_scale, bias, dtype)


def check_native(device: torch.device) -> None:
    """``ValueError`` unless the device multiplies HiF8 itself."""
    if device.type != "npu" or not npu.multiplies(device):
        raise ValueError(f"{device} has no HiF8 matrix product of its own: choose quant.product=fast or exact")


def native_product(
    operand: torch.Tensor,
    weight_codes: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The device's own product of HiF8 values [rows, k] with codes [columns, k], scaled and biased."""
    check_native(operand.device)
    return npu.multiply(encode_hif8(operand), weight_codes, row_scale, column_scale, bias, dtype)
