"""The 8-bit floats of the Open Compute Project (OFP8), by torch's own types: to nearest, ties to even.

E4M3 has no infinity: what overflows becomes NaN with ``overflow="inf"``, ±448 with ``overflow="saturate"``, and a
true infinity NaN either way. E5M2 overflows to infinity or to ±57344, and a true infinity stays one. Both have a -0.
"""

from __future__ import annotations

import torch

from wanquant.formats.base import Format


class Minifloat(Format):
    def __init__(self, name: str, dtype: torch.dtype, overflow: float) -> None:
        self.name, self.dtype, self.overflow = name, dtype, overflow
        self.target = torch.finfo(dtype).max

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return self._cast(x, overflow).to(x.dtype)

    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return self._cast(x, overflow).view(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return codes.view(self.dtype).to(dtype)

    def _cast(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        self.check_overflow(overflow)
        # Said here and not left to torch, whose casts have overflowed to NaN in one version and saturated in another.
        wide = x.float()
        beyond = wide.isinf() if overflow == "saturate" else wide.abs() >= self.overflow
        special = wide * torch.inf if self.dtype == torch.float8_e5m2 else torch.nan
        return torch.where(beyond, special, wide.clamp(-self.target, self.target)).to(self.dtype)


#: 464 lies in the middle of 448 and the 480 that is not there; the tie goes to 448, whose last bit is 0. The next
#: float32 overflows.
E4M3 = Minifloat("e4m3", torch.float8_e4m3fn, overflow=464.0 + 2.0**-15)
#: 61440 lies in the middle of 57344 and 65536; the tie goes to the latter.
E5M2 = Minifloat("e5m2", torch.float8_e5m2, overflow=61440.0)
