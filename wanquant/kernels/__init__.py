"""How rounding is made fast: one set of torch ops, an implementation per device."""

from wanquant.kernels.dispatch import (
    absmax_rows,
    check_native,
    descale,
    native_product,
    quantize_rows_hif8,
    scaled_round_hif8,
)
from wanquant.kernels.eager import OVERFLOW, absmax_to_scale, times, two_to

__all__ = [
    "OVERFLOW",
    "absmax_rows",
    "absmax_to_scale",
    "check_native",
    "descale",
    "native_product",
    "quantize_rows_hif8",
    "scaled_round_hif8",
    "times",
    "two_to",
]
