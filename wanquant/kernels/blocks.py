"""Rounding to formats in which a block of a row shares a scale, in plain torch: exact on every device, not fast.

A block is divided by its scale, its elements go to the nearest of a small grid, and the product of both, which BF16
holds, is what a matrix product sees. ``BlockRounding`` is what a format says of itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from wanquant.kernels.eager import in_parts, times, two_to

#: What the scale of a block may be: E4M3, a power of two (E8M0), BF16, or HiF4's three levels.
SCALE_E4M3, SCALE_E8M0, SCALE_BF16, SCALE_HIF4 = range(4)
#: The largest E4M3, and the range of E6M2, HiF4's first level.
LARGEST_SCALE, SMALLEST_LEVEL, LARGEST_LEVEL = 448.0, 2.0**-48, 49152.0
#: 1/7 in BF16, by which HiF4's definition multiplies: 7 is the largest a block reaches, times its first level.
SEVENTH = 0.142578125


class BlockRounding(NamedTuple):
    """Of how many elements a block is, the kind of its scale, and the grid of the elements: mantissa bits, the exponent
    of the smallest normal value, the largest value. ``limit``: magnitudes that count as overflow."""

    block: int
    kind: int
    mantissa: int
    exponent: int
    largest: float
    limit: float


def round_blocks(
    x: torch.Tensor,
    scale: torch.Tensor,
    block: int,
    kind: int,
    mantissa: int,
    exponent: int,
    largest: float,
    limit: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale of a matrix, rounded block by block, as BF16; and how many are at ``limit`` or above, int64 []."""
    over = torch.zeros((), dtype=torch.int64, device=x.device)
    how = BlockRounding(block, kind, mantissa, exponent, largest, limit)

    def rounded(part: torch.Tensor, by_row: torch.Tensor) -> torch.Tensor:
        nonlocal over
        scaled = times(part, factors) / (by_row[:, None] if by_row.ndim else by_row)
        over = over + (scaled.abs() >= limit).sum()
        values = _round(scaled.reshape(-1, block), how).to(torch.bfloat16).view(part.shape)
        return values.masked_fill(values.isnan(), torch.nan)  # torch's own cast to BF16 has two kinds of it

    return in_parts(rounded, torch.bfloat16, x.contiguous(), scale), over


def _round(x: torch.Tensor, how: BlockRounding) -> torch.Tensor:
    """Of blocks [count, block] in float32; a block that is not finite becomes NaN."""
    magnitude = x.abs()
    absmax = magnitude.amax(1, keepdim=True)
    if how.kind == SCALE_HIF4:
        level = hif4_level(absmax)
        unit = hif4_units(magnitude, level)
        rounded = hif4_elements(magnitude, level, unit / level) * unit
    else:
        scale = block_scale(absmax, how)
        rounded = round_element(magnitude / scale, how.mantissa, how.exponent, how.largest) * scale
        rounded = torch.where(scale == 0, 0.0, rounded)
    signed = torch.copysign(rounded, x)
    if how.kind == SCALE_BF16:  # whole numbers have one zero
        signed = signed + 0.0
    return torch.where(absmax.isfinite(), signed, torch.nan)


def round_element(magnitude: torch.Tensor, mantissa: int, exponent: int, largest: float) -> torch.Tensor:
    """To the nearest of a grid of small floats, ties to even, at most ``largest``."""
    magnitude = magnitude.clamp_max(largest)
    own = (torch.frexp(magnitude).exponent - 1).clamp_min(exponent)
    step = two_to(own - mantissa)
    return (magnitude / step).round() * step


def block_scale(absmax: torch.Tensor, how: BlockRounding) -> torch.Tensor:
    """The scale of blocks by their largest magnitudes; 0 where all of the block becomes 0."""
    if how.kind == SCALE_E8M0:  # OCP Microscaling 1.0, section 6.3: a part saturates
        top = math.frexp(how.largest)[1]
        exponent = (torch.frexp(absmax).exponent - top).clamp(-127, 127)
        return two_to(exponent.masked_fill(absmax == 0, -127))
    wanted = absmax / torch.full_like(absmax, how.largest)
    if how.kind == SCALE_BF16:
        return wanted.to(torch.bfloat16).float()
    return round_element(wanted, 3, -6, LARGEST_SCALE)


def hif4_level(absmax: torch.Tensor) -> torch.Tensor:
    """HiF4's first level, E6M2: a seventh of the largest magnitude, rounded to BF16 and then to two mantissa bits."""
    wanted = (absmax * SEVENTH).to(torch.bfloat16).float()
    return round_element(wanted.clamp_min(SMALLEST_LEVEL), 2, -48, LARGEST_LEVEL)


def hif4_units(magnitude: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Of each element what S1P2 is multiplied by: the first level, doubled for eights that reach 4 of it, and again
    for fours that reach 2 of what that is."""
    reciprocal = hif4_reciprocal(level)
    fours = magnitude.view(-1, 16, 4).amax(2) * reciprocal
    eights = fours.view(-1, 8, 2).amax(2) >= 4
    second = eights.repeat_interleave(2, 1)
    third = torch.where(second, fours * 0.5, fours) >= 2
    shift = second.to(torch.int32) + third.to(torch.int32)
    return (level * two_to(shift)).repeat_interleave(4, 1)


def hif4_reciprocal(level: torch.Tensor) -> torch.Tensor:
    """1 / level in BF16, which the definition multiplies by."""
    return (1 / level).to(torch.bfloat16).float()


def hif4_elements(magnitude: torch.Tensor, level: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """S1P2 of magnitudes over their units, ties away from zero; ``power`` is 1, 2 or 4."""
    scaled = magnitude * (hif4_reciprocal(level) / power)
    return (scaled * 4 + 0.5).floor().clamp_max(7) * 0.25
