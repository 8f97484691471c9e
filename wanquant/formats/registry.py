"""The formats by name, so that the rest of the library speaks of a format and not of a module."""

from __future__ import annotations

import math

import torch

from wanquant import kernels
from wanquant.choices import mistaken
from wanquant.formats import hif8
from wanquant.formats.base import Format
from wanquant.formats.integer import Int8
from wanquant.formats.minifloat import E4M3, E5M2, MXFP8


class HiF8(Format):
    """``wanquant.formats.hif8`` as a ``Format``. 15 keeps a slice within the zone of three mantissa bits."""

    name = "hif8"
    overflow = kernels.OVERFLOW
    target = 15.0
    default_overflow = "inf"

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return hif8.round(x, overflow)

    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return hif8.encode(x, overflow)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return hif8.decode(codes, dtype)

    def scaled_round(
        self, x: torch.Tensor, scale: torch.Tensor, overflow: str, factors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.scaled_round_hif8(x, scale, overflow, factors)

    def quantize_rows(
        self, x: torch.Tensor, target: float, power_of_two: bool, overflow: str, factors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.quantize_rows_hif8(x, target, power_of_two, overflow, factors)


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


FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (HiF8(), E4M3, E5M2, MXFP8, Int8(), BFloat16())}


def get_format(name: str) -> Format:
    """The format of that name; ``ValueError`` lists those there are."""
    if name not in FORMATS:
        raise mistaken("quant.format", name, FORMATS)
    return FORMATS[name]
