"""What every number format can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from wanquant import kernels


class Format(ABC):
    """A number format of at most 8 bits, whose values are all exact in BF16.

    overflow          the least magnitude that rounds beyond the largest finite value
    target            where a scale rule without a target of its own brings the largest magnitude
    default_overflow  ``inf`` or ``saturate``, what becomes of such a magnitude unless told otherwise
    keeps_all         no linear is converted to it
    codes_all         NaN and infinity have codes
    bits              of an element's code
    block             how many elements of a row share a scale that is the format's own; 0: none do
    """

    name: str
    overflow: float
    target: float
    default_overflow: str = "saturate"
    keeps_all: bool = False
    codes_all: bool = True
    bits: int = 8
    block: int = 0

    def default_rule(self) -> str:
        """The scale rule where none is asked for, of what is outside of a block's own scale."""
        return f"amax/{self.target:g}"

    def row_bytes(self, columns: int) -> int:
        """Of a row's codes; ``ValueError`` if it does not divide into blocks."""
        return columns

    def columns_of(self, row_bytes: int) -> int:
        """How many elements a row of so many bytes has."""
        return row_bytes

    @abstractmethod
    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        """Nearest value of each element, in the shape and dtype of ``x``; NaN stays NaN."""

    @abstractmethod
    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        """uint8 codes of the rounded elements: in their shape, or [..., ``row_bytes``]."""

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 codes of values that are on the grid, whatever rounding them again would make of them."""
        return self.encode(values, self.default_overflow)

    @abstractmethod
    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The values of uint8 codes."""

    def check_overflow(self, overflow: str) -> None:
        """``ValueError`` if the format has no such way to overflow."""
        if overflow not in ("inf", "saturate"):
            raise ValueError("choose inf or saturate")

    def scaled_round(
        self, x: torch.Tensor, scale: torch.Tensor, overflow: str, factors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """round(x / scale) of a matrix as BF16, the division in float32; and how many overflowed (int64 []).

        ``scale`` is float32, [rows] or of no dimension; ``factors``, float32 [columns], powers of two, come first.
        """
        scaled = kernels.times(x, factors) / (scale[:, None] if scale.ndim else scale)
        return self.round(scaled, overflow).to(torch.bfloat16), (scaled.abs() >= self.overflow).sum()

    def quantize_rows(
        self, x: torch.Tensor, target: float, power_of_two: bool, overflow: str, factors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``scaled_round`` by the scale that brings each row's absmax to ``target``: BF16 values, scales [rows]."""
        x = kernels.times(x, factors)
        scale = kernels.absmax_to_scale(kernels.absmax_rows(x), target, power_of_two)
        return self.scaled_round(x, scale, overflow)[0], scale
