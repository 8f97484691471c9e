"""The formats by name, so that the rest of the library speaks of a format and not of a module."""

from __future__ import annotations

import math

import torch

from wanquant import kernels
from wanquant.choices import mistaken
from wanquant.formats import hif8
from wanquant.formats.base import Format
from wanquant.formats.blocks import HIF4, INT4_64, INT4_128, MXFP4, MXFP6, MXFP8, NVFP4
from wanquant.formats.integer import Int8
from wanquant.formats.minifloat import E4M3, E5M2


class HiF8(Format):
    """``wanquant.formats.hif8`` as a ``Format``. 15 keeps a slice within the zone of three mantissa bits."""

    name = "hif8"
    overflow = kernels.OVERFLOW
    target = 15.0
    default_overflow = "inf"

    round = staticmethod(hif8.round)
    encode = staticmethod(hif8.encode)
    decode = staticmethod(hif8.decode)
    scaled_round = staticmethod(kernels.scaled_round_hif8)
    quantize_rows = staticmethod(kernels.quantize_rows_hif8)


class BFloat16(Format):
    """Not a quantization: the control in which every linear stays what it is."""

    name = "bf16"
    overflow = math.inf
    target = 1.0
    keeps_all = True

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        raise ValueError("bf16 has no 8-bit codes")

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        raise ValueError("bf16 has no 8-bit codes")


FORMATS: dict[str, Format] = {}


def register_format(format_: Format) -> None:
    """Makes a format known by its ``name`` to configs and checkpoints. ``ValueError`` for a name that is taken."""
    if format_.name in FORMATS:
        raise ValueError(f"the format {format_.name} is registered already")
    FORMATS[format_.name] = format_


_BLOCKS = (NVFP4, MXFP4, MXFP6, MXFP8, HIF4, INT4_64, INT4_128)
for _format in (HiF8(), E4M3, E5M2, Int8(), *_BLOCKS, BFloat16()):
    register_format(_format)


def get_format(name: str) -> Format:
    """The format of that name; ``ValueError`` lists those there are."""
    if name not in FORMATS:
        raise mistaken("quant.format", name, FORMATS)
    return FORMATS[name]
