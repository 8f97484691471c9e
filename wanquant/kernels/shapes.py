"""What the ops return, without computing it: shapes and types for ``torch.compile`` and ``FakeTensorMode``."""

from __future__ import annotations

import torch


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    return None


def round_hif8_stochastic(x: torch.Tensor, noise: torch.Tensor, saturate: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty((), dtype=torch.int64)


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty(x.shape[:1], dtype=torch.float32)


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return product.new_empty(product.shape, dtype=dtype)
