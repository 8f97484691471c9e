"""Symmetric INT8: whole numbers from -127 to 127, to nearest, ties to even.

It has neither infinity nor NaN. ``round`` turns both into NaN, so that a broken tensor still looks broken;
``encode`` refuses them.
"""

from __future__ import annotations

import torch

from wanquant.formats.base import Format


class Int8(Format):
    name = "int8"
    overflow = 127.5
    target = 127.0
    codes_all = False

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        self.check_overflow(overflow)
        # Adding 0 turns the -0 that rounding leaves into +0, as an integer has only one.
        return torch.where(x.isinf(), torch.nan, x.round().clamp(-127, 127) + 0.0)

    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        rounded = self.round(x, overflow)
        if rounded.isnan().any():
            raise ValueError("int8 has no code for what is not finite")
        return rounded.to(torch.int8).view(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return codes.view(torch.int8).to(dtype)

    def check_overflow(self, overflow: str) -> None:
        if overflow != "saturate":
            raise ValueError("int8 has no infinity, choose saturate")
