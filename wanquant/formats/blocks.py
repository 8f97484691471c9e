"""Formats in which a block of a row shares a scale: NVFP4, MXFP4, MXFP6, MXFP8, HiF4 and INT4 in groups.

A value is element times scale of its block, and BF16 holds that product, so that a matrix product sees one BF16
operand. For INT4 it is that product rounded to BF16, as kernels that decode it before they multiply compute it. A
format says which grid its elements are of, how many share a scale, and of which kind that is:

    E4M3    NVFP4: the largest magnitude over the largest element, to nearest
    E8M0    MX (OCP Microscaling 1.0): the largest magnitude's power of two over that of the largest element; what is
            between the largest element and the next power of two saturates
    BF16    INT4: the largest magnitude over the largest element
    HiF4    (arXiv 2602.11287) 64 elements share E6M2, eights of them a power of two, and fours of these another

Outside of that there is the scale of ``wanquant.quant.scale``, as with any format: NVFP4's float32 scale of the tensor;
1 elsewhere. ``wanquant.formats.block_reference`` is the same one block at a time.

Packed, a row is the codes of its elements, the first in the lowest bits of the first byte, and behind them the scales
of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from wanquant import kernels
from wanquant.formats.base import Format
from wanquant.kernels import SCALE_BF16, SCALE_E4M3, SCALE_E8M0, SCALE_HIF4, BlockRounding
from wanquant.kernels.blocks import (
    LARGEST_LEVEL,
    LARGEST_SCALE,
    SCALE_BYTES,
    SMALLEST_LEVEL,
    block_units,
    code_blocks,
    fit_blocks,
    round_element,
    round_to_units,
    scale_bytes,
)
from wanquant.kernels.eager import two_to


class BlockFormat(Format):
    """``bits`` of an element, its grid (mantissa bits, exponent of the smallest normal value, largest value), how many
    share a scale, and its kind."""

    def __init__(
        self, name: str, bits: int, mantissa: int, exponent: int, largest: float, block: int, kind: int
    ) -> None:
        self.name, self.bits, self.block, self.kind = name, bits, block, kind
        self.target = LARGEST_SCALE * largest if kind == SCALE_E4M3 else 1.0
        # Beyond the largest scale times the largest element, where the next element would be the nearer.
        step = 2.0 ** (math.frexp(largest)[1] - 1 - mantissa)
        ends = {SCALE_E4M3: LARGEST_SCALE, SCALE_HIF4: 4 * LARGEST_LEVEL}
        self.overflow = ends.get(kind, math.inf) * (largest + step / 2)
        self.how = BlockRounding(block, kind, mantissa, exponent, largest, self.overflow)
        #: The grid's values that are not negative, in order: those of the codes from 0 on.
        self.magnitudes = _magnitudes(self.how)
        #: The value of each code: sign and magnitude, of whole numbers two's complement. NaN where there is none.
        grid = _grid(self.magnitudes, bits, kind == SCALE_BF16).to(torch.bfloat16)
        #: By byte the value of the code in it; of four bits those of both its codes, as one float32.
        self._table = F.pad(grid, (0, 256 - len(grid)))
        if bits == 4:
            self._table = torch.stack([grid.repeat(16), grid.repeat_interleave(16)], 1).view(torch.float32).flatten()

    def default_rule(self) -> str:
        return super().default_rule() if self.kind == SCALE_E4M3 else "direct"

    def row_bytes(self, columns: int) -> int:
        if columns % self.block:
            raise ValueError(f"rows of {columns} elements do not divide into blocks of {self.block}")
        return columns * self.bits // 8 + columns // self.block * SCALE_BYTES[self.kind]

    def columns_of(self, row_bytes: int) -> int:
        return row_bytes // (self.block * self.bits // 8 + SCALE_BYTES[self.kind]) * self.block

    def check_overflow(self, overflow: str) -> None:
        if overflow != "saturate":
            raise ValueError(f"{self.name} has no infinity, choose saturate")

    def scaled_round(
        self, x: torch.Tensor, scale: torch.Tensor, overflow: str, factors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_overflow(overflow)
        return kernels.round_blocks(x, scale, self.how, factors)

    def column_rounder(self, blocks: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Finds the scales of blocks, float32 [count, block], and gives what rounds a column of them, [count], by its
        place, to BF16: whatever the column is by then."""
        scale, units = block_units(blocks, self.how)
        units = units.expand_as(blocks)

        def rounded(column: torch.Tensor, place: int) -> torch.Tensor:
            values = round_to_units(column[:, None], scale, units[:, place : place + 1], self.how)[:, 0]
            return values.to(torch.bfloat16).masked_fill(values.isnan(), torch.nan)

        return rounded

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self.scaled_round(rows, x.new_ones((), dtype=torch.float32), overflow)[0].view(x.shape).to(x.dtype)

    def encode(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return self.pack(self.round(x, overflow))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        elements, scales = self.split(values)
        return torch.cat([_bits_to_bytes(elements, self.bits), scales], dim=-1)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        columns = self.columns_of(codes.shape[-1])
        packed, scales = codes.split([columns * self.bits // 8, codes.shape[-1] - columns * self.bits // 8], dim=-1)
        units = self._units(scales.unflatten(-1, (-1, SCALE_BYTES[self.kind])))
        values: torch.Tensor = self._elements(packed).unflatten(-1, (-1, self.block)) * units
        return values.flatten(-2).to(dtype)

    def _elements(self, packed: torch.Tensor) -> torch.Tensor:
        """BF16 [..., columns] of the codes of a row; of four bits two at a time, as one float32."""
        packed = _bytes_to_bits(packed) if self.bits == 6 else packed
        found: torch.Tensor = kernels.look_up(packed, self._table.to(packed.device)).view(torch.bfloat16)
        return found

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of values [..., columns] on the grid the codes of their elements, uint8 in the same shape, and the bytes of
        their blocks' scales, uint8 [..., blocks · bytes]. ``ValueError`` for values that are not on it."""
        rows = values.reshape(-1, values.shape[-1])
        codes, scales, held = kernels.split_blocks(rows.to(torch.bfloat16), self.how, self.bits)
        if not held.all():
            # The scale that rounding takes for the largest magnitude is nearly always one that holds all of a block.
            # Where it is not, the others are tried.
            left = ~held.flatten()
            found = self._search(rows.reshape(-1, self.block)[left].float())
            codes.view(-1, self.block)[left], scales.view(-1, SCALE_BYTES[self.kind])[left] = found
        if values.dtype != torch.bfloat16 and ((rows != rows.to(torch.bfloat16)) & rows.isfinite()).any():
            raise ValueError(f"these are no values of {self.name}")
        return codes.view(values.shape), scales.view(*values.shape[:-1], -1)

    def _units(self, scales: torch.Tensor) -> torch.Tensor:
        """BF16 [..., blocks, block] by which elements are multiplied, of the bytes [..., blocks, bytes]."""
        if self.kind == SCALE_HIF4:
            return _hif4_units(scales)
        if self.kind == SCALE_E4M3:
            found = scales.view(torch.float8_e4m3fn).float()
        elif self.kind == SCALE_E8M0:
            found = torch.where(scales == 255, torch.nan, two_to(scales.to(torch.int32) - 127))
        else:
            found = scales.contiguous().view(torch.bfloat16).float()
        return found.to(torch.bfloat16).expand(*found.shape[:-1], self.block)

    def _search(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``split``, of blocks [count, block] in float32, all finite."""
        magnitude = blocks.abs()
        absmax = magnitude.amax(1, keepdim=True)
        scale = torch.zeros_like(absmax)
        units, held = torch.zeros_like(magnitude), torch.zeros_like(absmax, dtype=torch.bool)
        for tried in self._other_scales(absmax):
            others, fits = fit_blocks(magnitude, tried, self.how)
            better = fits & ~held
            units, scale, held = torch.where(better, others, units), torch.where(better, tried, scale), held | fits
            if held.all():
                return code_blocks(blocks, units, self.how, self.bits), scale_bytes(scale, units, self.how)
        raise ValueError(f"these are no values of {self.name}")

    def _other_scales(self, absmax: torch.Tensor) -> Iterator[torch.Tensor]:
        """Those with which the largest magnitude is an element's, [count, 1]; where there is none, what it would be."""
        if self.kind == SCALE_E8M0:  # that of MXFP8's 1.875, whose largest is 1.75 · 2^8
            yield two_to((torch.frexp(absmax).exponent - math.frexp(self.how.largest)[1] + 1).clamp(-127, 127))
            return
        times = (1.0, 2.0, 4.0) if self.kind == SCALE_HIF4 else (1.0,)
        for element in self.magnitudes[1:].flip(0).tolist():
            for power in times:
                scale = absmax / (element * power)
                if self.kind == SCALE_HIF4:
                    scale = scale.clamp(SMALLEST_LEVEL, LARGEST_LEVEL)
                    yield round_element(scale, 2, -48, LARGEST_LEVEL)
                elif self.kind == SCALE_E4M3:
                    yield round_element(scale, 3, -6, LARGEST_SCALE)
                elif self.kind == SCALE_BF16:
                    near = scale.to(torch.bfloat16)
                    for away in (0, 1, -1):
                        yield (near.view(torch.int16) + away).view(torch.bfloat16).float()


def _magnitudes(how: BlockRounding) -> torch.Tensor:
    found = [0.0, 2.0 ** (how.exponent - how.mantissa)]
    while found[-1] < how.largest:
        found.append(found[-1] + 2.0 ** (max(how.exponent, math.frexp(found[-1])[1] - 1) - how.mantissa))
    return torch.tensor(found)


def _grid(magnitudes: torch.Tensor, bits: int, whole: bool) -> torch.Tensor:
    count, used = 2**bits, len(magnitudes)
    found = torch.full((count,), torch.nan)
    found[:used] = magnitudes
    if whole:
        found[count - used + 1 :] = -magnitudes[1:].flip(0)
    else:
        found[count // 2 : count // 2 + used] = -magnitudes
    return found


def _hif4_units(scales: torch.Tensor) -> torch.Tensor:
    """Of the four bytes of blocks: E6M2, eight bits, sixteen bits, the first in the lowest; BF16 [..., 64]."""
    level = scales[..., :1].to(torch.int32)
    first = (1 + (level & 3) / 4) * two_to((level >> 2) - 48)
    first = torch.where(level == 255, torch.nan, first)
    places = torch.arange(8, dtype=torch.uint8, device=scales.device)
    bits = (scales[..., 1:, None] >> places & 1).to(torch.int32)
    shift = bits[..., 0, :].repeat_interleave(2, -1) + bits[..., 1:, :].flatten(-2)
    units: torch.Tensor = first * two_to(shift)
    return units.to(torch.bfloat16).repeat_interleave(4, -1)


def _bits_to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of so many bits one behind the other, the first in the lowest bits; uint8 [..., columns · bits / 8]."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., ::2] | codes[..., 1::2] << 4
    fours = codes.unflatten(-1, (-1, 4)).to(torch.int32) << torch.arange(0, 24, 6, device=codes.device)
    whole = fours.sum(-1, keepdim=True, dtype=torch.int32) >> torch.arange(0, 24, 8, device=codes.device)
    return torch.flatten((whole & 255).to(torch.uint8), -2)


def _bytes_to_bits(packed: torch.Tensor) -> torch.Tensor:
    """Of six bits, what ``_bits_to_bytes`` was given."""
    whole = packed.unflatten(-1, (-1, 3)).to(torch.int32) << torch.arange(0, 24, 8, device=packed.device)
    fours = whole.sum(-1, keepdim=True, dtype=torch.int32) >> torch.arange(0, 24, 6, device=packed.device)
    return torch.flatten((fours & 63).to(torch.uint8), -2)


NVFP4 = BlockFormat("nvfp4", 4, 1, 0, 6.0, block=16, kind=SCALE_E4M3)
MXFP4 = BlockFormat("mxfp4", 4, 1, 0, 6.0, block=32, kind=SCALE_E8M0)
MXFP6 = BlockFormat("mxfp6", 6, 2, -2, 28.0, block=32, kind=SCALE_E8M0)
MXFP8 = BlockFormat("mxfp8", 8, 3, -6, 448.0, block=32, kind=SCALE_E8M0)
HIF4 = BlockFormat("hif4", 4, 2, 0, 1.75, block=64, kind=SCALE_HIF4)
INT4_64 = BlockFormat("int4_g64", 4, 2, 2, 7.0, block=64, kind=SCALE_BF16)
INT4_128 = BlockFormat("int4_g128", 4, 2, 2, 7.0, block=128, kind=SCALE_BF16)
