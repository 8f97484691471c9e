"""What the other rooms call on matrices: arguments checked, then the op of the tensor's device
(``wanquant.kernels.ops``). What goes element by element is in ``wanquant.formats.hif8``.

All functions are free of autograd and take float32, bfloat16 or float16 of any layout.
"""

from __future__ import annotations

from typing import Any

import torch

from wanquant.kernels import npu
from wanquant.kernels import ops as _registered  # noqa: F401  torch.ops.wanquant
from wanquant.kernels.blocks import BlockRounding
from wanquant.kernels.tables import decode_table, encode_table, round_table

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS: Any = torch.ops.wanquant


def check_float(x: torch.Tensor) -> None:
    """Refuses what no kernel computes exactly."""
    if x.dtype not in FLOATS:
        raise TypeError(f"HiF8 takes float32, bfloat16 or float16, not {x.dtype}")


def saturates(overflow: str) -> bool:
    if overflow not in ("inf", "saturate"):
        raise ValueError(f"overflow must be 'inf' or 'saturate', not {overflow!r}")
    return overflow == "saturate"


def check_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Refuses what a kernel would read past the end of, or take for other numbers."""
    check_float(x)
    _check_matrix(x, scale)


def _check_matrix(x: torch.Tensor, scale: torch.Tensor | None) -> None:
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


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of a matrix, float32 [rows]; NaN where the row holds one."""
    check_rows(x)
    return OPS.absmax_rows.default(x)


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, overflow: str = "inf", factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """round(x / scale) of a matrix [rows, columns] as BF16, the division in float32; int64 [], how many overflowed.

    ``scale`` is float32, [rows] or of no dimension. There is no rounding to BF16 between the division and
    the rounding, so nothing is rounded twice. ``factors``, float32 [columns], powers of two, multiply x first.
    """
    check_rows(x, scale)
    _check_factors(x, factors)
    return OPS.scaled_round_hif8.default(x, scale, saturates(overflow), factors)


def quantize_rows_hif8(
    x: torch.Tensor, target: float, power_of_two: bool, overflow: str = "inf", factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_round_hif8`` by the scale of each row (``absmax_to_scale``), in one pass: BF16 [rows, columns], scales
    [rows].

    The absmax is that of the row times ``factors``.
    """
    check_rows(x)
    _check_factors(x, factors)
    return OPS.quantize_rows_hif8.default(x, target, power_of_two, saturates(overflow), factors)


def round_blocks(
    x: torch.Tensor, scale: torch.Tensor, how: BlockRounding, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale of a matrix [rows, columns] rounded block by block, as BF16; int64 [], how many overflowed.

    Arguments as those of ``scaled_round_hif8``; rows divide into blocks."""
    check_rows(x, scale)
    _check_factors(x, factors)
    if x.shape[1] % how.block:
        raise ValueError(f"rows of {x.shape[1]} elements do not divide into blocks of {how.block}")
    return OPS.round_blocks.default(x, scale, *how, factors)


def split_blocks(
    values: torch.Tensor, how: BlockRounding, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of BF16 values on the grid, [rows, columns], the codes of their elements by the scale that rounding takes for the
    largest magnitude of a block, uint8 in the same shape; the bytes of those scales, uint8 [rows, blocks · bytes]; and
    which blocks have only multiples of it, bool [rows, blocks]."""
    if values.dtype != torch.bfloat16 or values.ndim != 2 or values.shape[1] % how.block:
        raise TypeError(f"{values.dtype} {tuple(values.shape)} is no BF16 matrix of blocks of {how.block}")
    return OPS.split_blocks.default(values, *how[:-1], bits)


def quantize_rows_coded(
    x: torch.Tensor,
    kind: int,
    target: float,
    power_of_two: bool,
    lift: float,
    divisor: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x / scale as uint8 codes [rows, columns], by the scales that ``quantize_rows_hif8`` takes; those scales over
    ``divisor``, a power of two, [rows]; and how many of the format's values the codes do not hold, of how many, int64
    [2].

    ``kind`` is ``CODED_HIF8``, HiF8's values times ``lift`` as E4M3, ``CODED_E4M3`` or ``CODED_INT8``. Of a row that is
    not finite, the scale is NaN.
    """
    check_rows(x)
    _check_factors(x, factors)
    return OPS.quantize_rows_coded.default(x, kind, target, power_of_two, lift, divisor, factors)


def carry_e4m3(values: torch.Tensor, lift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes of E4M3 of BF16 values, with at most three mantissa bits, times ``lift``, a power of two; int64 [2],
    how many of them are other values, of how many. What is beyond 448 becomes that, and what is not finite NaN."""
    if values.dtype != torch.bfloat16:
        raise TypeError(f"carried values are bfloat16, not {values.dtype}")
    return OPS.carry_e4m3.default(values, lift)


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of each uint8 code in ``table`` [256], in their shape."""
    if codes.dtype != torch.uint8 or table.shape != (256,) or codes.device != table.device:
        raise TypeError(f"{codes.dtype} codes on {codes.device}, a table {tuple(table.shape)} on {table.device}")
    found: torch.Tensor = OPS.look_up.default(codes, table.contiguous())
    return found


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """product · row scale · column scale + bias in float32, rounded once to ``dtype``.

    ``product`` is [rows, columns], of whole numbers int32; the scales are float32, [rows] and [columns] or of no
    dimension.
    """
    if product.dtype != torch.int32:
        check_float(product)
    _check_matrix(product, row_scale)
    _check_scale(column_scale, product.shape[1], "columns", product.device)
    if bias is not None:
        check_float(bias)
        if bias.shape != product.shape[1:] or bias.device != product.device:
            raise ValueError(f"the bias has to be [{product.shape[1]}] on {product.device}")
    if dtype not in FLOATS:
        raise TypeError(f"products are scaled to float32, bfloat16 or float16, not {dtype}")
    return OPS.descale.default(product, row_scale, column_scale, bias, dtype)


def make_tables(device: torch.device, overflow: str = "inf") -> None:
    """Makes now what a card's kernels look things up in. Made by the first pass, it would belong to a CUDA graph that
    captures that."""
    if device.type == "cuda":
        round_table(saturates(overflow), device)
        encode_table(device)
        decode_table(torch.bfloat16, device)


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
    return npu.multiply(OPS.encode_hif8.default(operand, False), weight_codes, row_scale, column_scale, bias, dtype)
