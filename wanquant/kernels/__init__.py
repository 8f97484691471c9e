"""How rounding is made fast: one set of torch ops, an implementation per device."""

from wanquant.kernels.blocks import SCALE_BF16, SCALE_E4M3, SCALE_E8M0, SCALE_HIF4, BlockRounding
from wanquant.kernels.dispatch import (
    absmax_rows,
    carry_e4m3,
    check_native,
    descale,
    look_up,
    make_tables,
    native_product,
    quantize_rows_coded,
    quantize_rows_hif8,
    round_blocks,
    scaled_round_hif8,
    split_blocks,
)
from wanquant.kernels.eager import (
    CODED_E4M3,
    CODED_HIF8,
    CODED_INT8,
    OVERFLOW,
    absmax_to_scale,
    times,
    two_to,
)
from wanquant.kernels.tables import LARGEST_E4M3

__all__ = [
    "CODED_E4M3",
    "CODED_HIF8",
    "CODED_INT8",
    "LARGEST_E4M3",
    "OVERFLOW",
    "SCALE_BF16",
    "SCALE_E4M3",
    "SCALE_E8M0",
    "SCALE_HIF4",
    "BlockRounding",
    "absmax_rows",
    "absmax_to_scale",
    "carry_e4m3",
    "check_native",
    "descale",
    "look_up",
    "make_tables",
    "native_product",
    "quantize_rows_coded",
    "quantize_rows_hif8",
    "round_blocks",
    "scaled_round_hif8",
    "split_blocks",
    "times",
    "two_to",
]
