"""How rounding is made fast: one set of torch ops, an implementation per device."""

from wanquant.kernels.dispatch import (
    absmax_rows,
    check_native,
    decode_hif8,
    descale,
    encode_hif8,
    native_product,
    quantize_rows_hif8,
    round_hif8,
    round_hif8_stochastic,
    scaled_round_hif8,
)
from wanquant.kernels.eager import OVERFLOW, absmax_to_scale, times, two_to

__all__ = [
    "OVERFLOW",
    "absmax_rows",
    "absmax_to_scale",
    "check_native",
    "decode_hif8",
    "descale",
    "encode_hif8",
    "native_product",
    "quantize_rows_hif8",
    "round_hif8",
    "round_hif8_stochastic",
    "scaled_round_hif8",
    "times",
    "two_to",
]
