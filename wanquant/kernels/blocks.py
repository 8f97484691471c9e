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
#: Bytes of a block's scale, by its kind.
SCALE_BYTES = {SCALE_E4M3: 1, SCALE_E8M0: 1, SCALE_BF16: 2, SCALE_HIF4: 4}
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
    return round_to_units(x, *block_units(x, how), how)


def block_units(x: torch.Tensor, how: BlockRounding) -> tuple[torch.Tensor, torch.Tensor]:
    """Of blocks [count, block] the scales, float32 [count, 1], NaN where a block is not finite; and what each element
    is a multiple of, the scale with all its levels, in a shape that expands to [count, block]."""
    magnitude = x.abs()
    absmax = magnitude.amax(1, keepdim=True)
    scale = hif4_level(absmax) if how.kind == SCALE_HIF4 else block_scale(absmax, how)
    units = hif4_units(magnitude, scale) if how.kind == SCALE_HIF4 else scale
    return torch.where(absmax.isfinite(), scale, torch.nan), units


def round_to_units(x: torch.Tensor, scale: torch.Tensor, units: torch.Tensor, how: BlockRounding) -> torch.Tensor:
    """Elements of blocks in float32, whole blocks or some columns of them, by what ``block_units`` gave for these."""
    magnitude = x.abs()
    if how.kind == SCALE_HIF4:
        rounded = hif4_elements(magnitude, scale, units / scale) * units
    else:
        rounded = round_element(magnitude / units, how.mantissa, how.exponent, how.largest) * units
        rounded = torch.where(units == 0, 0.0, rounded)
    signed = torch.copysign(rounded, x)
    if how.kind == SCALE_BF16:  # whole numbers have one zero
        signed = signed + 0.0
    return torch.where(scale.isnan(), torch.nan, signed)


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


#: Elements that are split together.
AT_ONCE = 1 << 22


def split_blocks(
    values: torch.Tensor, block: int, kind: int, mantissa: int, exponent: int, largest: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of BF16 values on the grid, [rows, columns], the codes of their elements by the scale that rounding takes for the
    largest magnitude of a block, uint8 in the same shape; the bytes of those scales, uint8 [rows, blocks · bytes]; and
    which blocks have only multiples of it, bool [rows, blocks]."""
    how = BlockRounding(block, kind, mantissa, exponent, largest, math.inf)
    rows = max(1, AT_ONCE // values.shape[1])
    parts = [_split(part.reshape(-1, block).float(), how, bits) for part in values.split(rows)]
    codes, scales, held = (torch.cat(each) for each in zip(*parts, strict=True))
    blocks = values.shape[1] // block
    return codes.view(values.shape), scales.view(len(values), -1), held.view(-1, blocks)


def _split(x: torch.Tensor, how: BlockRounding, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    magnitude = x.abs()
    absmax = magnitude.amax(1, keepdim=True)
    broken = ~absmax.isfinite()
    magnitude, absmax = magnitude.masked_fill(broken, 0.0), absmax.masked_fill(broken, 0.0)
    scale = hif4_level(absmax) if how.kind == SCALE_HIF4 else block_scale(absmax, how)
    units, held = fit_blocks(magnitude, scale, how)
    codes = code_blocks(x.masked_fill(broken, 0.0), units, how, bits)
    return codes, scale_bytes(scale.masked_fill(broken, torch.nan), units, how), held


def fit_blocks(magnitude: torch.Tensor, scale: torch.Tensor, how: BlockRounding) -> tuple[torch.Tensor, torch.Tensor]:
    """By a scale for each block, of what its elements are multiples, [count, block], and whether all of them are,
    [count, 1]."""
    if how.kind == SCALE_HIF4:
        return _fit_hif4(magnitude, scale)
    elements = torch.where(scale == 0, 0.0, magnitude / scale)
    product = round_element(elements, how.mantissa, how.exponent, how.largest) * scale
    if how.kind == SCALE_BF16:
        # What is rounded to BF16 is no exact multiple: its quotient is the element all the same.
        product = product.to(torch.bfloat16).float()
    return scale.expand_as(magnitude), (product == magnitude).all(1, keepdim=True)


def _fit_hif4(magnitude: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By first levels: for each eight a second level with which a third holds both fours."""
    quarters = (magnitude / level * 4).view(-1, 8, 2, 4)
    fits = [_whole(quarters / 2**shift) for shift in range(3)]  # by fours, [count, 8, 2]
    without = (fits[0] | fits[1]).all(2)
    within = (fits[1] | fits[2]).all(2)
    low = torch.where(fits[0], 0, 1)
    high = torch.where(fits[1], 1, 2)
    shift = torch.where(without[..., None], low, high).flatten(1).to(torch.int32)
    # An eight of which one four needs no doubling and one needs two is on no grid.
    return (level * two_to(shift)).repeat_interleave(4, 1), (without | within).all(1, keepdim=True)


def _whole(quarters: torch.Tensor) -> torch.Tensor:
    return ((quarters == quarters.floor()) & (quarters <= 7)).all(3)


def code_blocks(x: torch.Tensor, units: torch.Tensor, how: BlockRounding, bits: int) -> torch.Tensor:
    """uint8 codes of elements, [count, block], by what they are multiples of: sign and magnitude, of whole numbers
    two's complement."""
    element = torch.where(units == 0, 0.0, x.abs() / units)
    element = round_element(element, how.mantissa, how.exponent, how.largest)
    small = element * 2.0 ** (how.mantissa - how.exponent)
    pattern = (element.view(torch.int32) >> (23 - how.mantissa)) - ((126 + how.exponent) << how.mantissa)
    code = torch.where(element < 2.0**how.exponent, small.to(torch.int32), pattern)
    if how.kind == SCALE_BF16:
        return torch.where(x.signbit(), (2**bits - code) % 2**bits, code).to(torch.uint8)
    return (code | (x.signbit().to(torch.int32) << (bits - 1))).to(torch.uint8)


def scale_bytes(scale: torch.Tensor, units: torch.Tensor, how: BlockRounding) -> torch.Tensor:
    """uint8 [count, bytes] of scales [count, 1], which are NaN where a block is not finite."""
    if how.kind == SCALE_BF16:
        return scale.to(torch.bfloat16).masked_fill(scale.isnan(), torch.nan).view(torch.uint8)  # of the one kind
    if how.kind == SCALE_E4M3:
        return scale.to(torch.float8_e4m3fn).view(torch.uint8)
    broken = scale.isnan()
    if how.kind == SCALE_E8M0:
        field = torch.frexp(scale.masked_fill(broken, 1.0)).exponent + 126
        return torch.where(broken, 255, field).to(torch.uint8)
    level = (scale.view(torch.int32) >> 21) - (79 << 2)
    power = torch.where(broken, 1.0, units[:, ::4] / scale)
    shift = (power >= 2).to(torch.int32) + (power >= 4).to(torch.int32)  # of fours
    second = (shift.view(-1, 8, 2) == 2).any(2)
    third = shift - second.repeat_interleave(2, 1).to(torch.int32)
    of_block = [torch.where(broken, 255, level), _bits(second), _bits(third[:, :8]), _bits(third[:, 8:])]
    return torch.cat(of_block, dim=1).to(torch.uint8)


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """[count, 1], of eight flags each, the first in the lowest bit."""
    return (flags.to(torch.int32) << torch.arange(8, device=flags.device)).sum(1, keepdim=True)
