"""How rounding is made fast: one set of functions, an implementation per device."""

from wanquant.kernels.dispatch import absmax_rows, decode_hif8, encode_hif8, round_hif8, scaled_round_hif8

__all__ = ["absmax_rows", "decode_hif8", "encode_hif8", "round_hif8", "scaled_round_hif8"]
