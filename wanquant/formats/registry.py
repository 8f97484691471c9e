"""The formats by name, so that the rest of the library speaks of a format and not of a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from wanquant import kernels
from wanquant.formats import hif8


class _Encode(Protocol):
    def __call__(self, x: torch.Tensor, overflow: str = "inf") -> torch.Tensor: ...


class _Decode(Protocol):
    def __call__(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor: ...


class _ScaledRound(Protocol):
    def __call__(self, x: torch.Tensor, scale: torch.Tensor, overflow: str = "inf") -> torch.Tensor: ...


@dataclass(frozen=True)
class Format:
    """An 8-bit float.

    ``overflow`` is the least magnitude that rounds beyond the largest finite value;
    ``scaled_round`` is round(x / scale) of a matrix as BF16 with one scale a row or one for all.
    """

    name: str
    overflow: float
    encode: _Encode
    decode: _Decode
    scaled_round: _ScaledRound


FORMATS: dict[str, Format] = {
    "hif8": Format(
        name="hif8",
        overflow=hif8.OVERFLOW,
        encode=hif8.encode,
        decode=hif8.decode,
        scaled_round=kernels.scaled_round_hif8,
    ),
}


def get_format(name: str) -> Format:
    """The format of that name; ``ValueError`` lists those there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
