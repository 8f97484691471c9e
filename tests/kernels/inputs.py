"""Inputs on which kernels of different devices are compared."""

from __future__ import annotations

import torch

_generator = torch.Generator().manual_seed(0)
#: Random bits: every exponent, NaN, infinities, subnormals.
WIDE = torch.randint(-(2**31), 2**31, (64, 1500), generator=_generator).to(torch.int32).view(torch.float32)
#: Every pattern of 16 bits.
ALL16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)


def _rows() -> torch.Tensor:
    """Rows of every magnitude, one of zeros, one with NaN, one with an infinity."""
    x = torch.randn(60, 257, generator=_generator) * torch.logspace(-44, 38, 60)[:, None]
    x[3] = 0
    x[5, 7] = torch.nan
    x[6, 1] = -torch.inf
    return x


MATRICES = (_rows(), WIDE)
#: Enough for several threads, in rows that do not divide evenly.
LARGE = torch.randn(601, 1000, generator=_generator) * torch.logspace(-6, 6, 601)[:, None]


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = (a.contiguous().view(bits) != b.contiguous().view(bits)).nonzero()
    assert len(different) == 0, f"{len(different)} differ, first at {different[0].tolist()}"
