"""The kernels of any device, one function per op: plain torch on integers. Exact, not fast.

A dozen tensors of four bytes an element are alive at once inside, so large ones go through in parts. On ``meta`` they
tell shapes, so that nothing here may ask for a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from wanquant.kernels.tables import LARGEST_E4M3, NAN_E4M3, carry_table, decode_table, encode_table, narrow

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_NAN = 0x7FC00000
_MAX = 142 << 23  # 2^15 = 32768, the largest finite value
_TINY = 104 << 23  # 2^-23: below it, zero
_SMALLEST = 105 << 23  # 2^-22, the smallest positive value
#: The magnitude from which rounding goes beyond 32768, the largest finite value.
OVERFLOW = 40960.0

#: Whose codes ``quantize_rows_coded`` gives: of HiF8 those of E4M3 that carry it.
CODED_HIF8, CODED_E4M3, CODED_INT8 = range(3)

#: Elements that go through together.
AT_ONCE = 1 << 24


def _rows_at_once(x: torch.Tensor) -> int:
    return max(1, AT_ONCE // max(1, x.shape[1:].numel()))


def in_parts(
    work: Callable[..., torch.Tensor], dtype: torch.dtype, x: torch.Tensor, by_row: torch.Tensor | None = None
) -> torch.Tensor:
    """``work(x)``, or with a scale for each row or for all ``work(x, by_row)``, of some rows at a time, to a tensor of
    this type in the shape of ``x``."""
    rows = _rows_at_once(x)
    given = (x,) if by_row is None else (x, by_row)
    if x.is_meta or x.shape[0] <= rows:  # tracing must not ask for the number of rows
        return work(*given)
    found = torch.empty(x.shape, dtype=dtype, device=x.device)
    for first in range(0, x.shape[0], rows):
        part = slice(first, first + rows)
        found[part] = work(*(each[part] if each.ndim else each for each in given))
    return found


def round_float32(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    """Rounds float32 to HiF8, ties away from zero: add half a unit of the magnitude's bits, cut the rest.

    The carry into the exponent is right everywhere, because the value it reaches, a power of two,
    is in every zone of the format.
    """
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    drop = _dropped_bits(magnitude)
    rounded = ((magnitude + (1 << (drop - 1))) >> drop) << drop
    rounded = torch.where(magnitude < _TINY, 0, rounded.clamp_min(_SMALLEST))
    return _finish(bits, magnitude, rounded, saturate)


def _dropped_bits(magnitude: torch.Tensor) -> torch.Tensor:
    """3 mantissa bits are kept up to |E| = 3, 2 up to 7, 1 up to 15, none in the denormal zone."""
    distance = ((magnitude >> 23) - 127).abs()
    return 20 + (distance > 3).int() + (distance > 7).int() + (distance > 15).int()


def _finish(bits: torch.Tensor, magnitude: torch.Tensor, rounded: torch.Tensor, saturate: bool) -> torch.Tensor:
    """Overflow, sign, the one zero and NaN."""
    over = (rounded > _MAX) & (magnitude != _INF) if saturate else rounded > _MAX
    rounded = torch.where(over, _MAX if saturate else _INF, rounded)
    signed = torch.where(rounded == 0, 0, rounded | (bits & ~_MAGNITUDE))
    return torch.where(magnitude > _INF, _NAN, signed).view(torch.float32)


def fit(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and in a type the compiled kernels read: float16 goes through float32, because it has subnormals
    where HiF8 has values."""
    return (x.float() if x.dtype == torch.float16 else x).contiguous()


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    def rounded(part: torch.Tensor) -> torch.Tensor:
        return narrow(round_float32(part.float(), saturate), x.dtype)

    return in_parts(rounded, x.dtype, x.contiguous().view(-1)).view(x.shape)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    out.copy_(round_hif8(x, saturate))


def round_hif8_stochastic(x: torch.Tensor, noise: torch.Tensor, saturate: bool) -> torch.Tensor:
    """To one of the two neighbours, the nearer the likelier, by 32 random bits an element (int32).

    The integer below which the upper neighbour is taken is the part of the magnitude that is cut off, so the
    expectation is exact; between 0 and 2^-22 the share is compared with 24 of the bits.
    """
    wide = x.to(torch.float32).contiguous()
    bits, noise = wide.view(torch.int32), noise.contiguous()
    magnitude = bits & _MAGNITUDE
    drop = _dropped_bits(magnitude)
    rounded = ((magnitude + (noise & ((1 << drop) - 1))) >> drop) << drop
    share = magnitude.view(torch.float32) * 2.0**22
    # Of the upper 24 bits, which float32 holds exactly.
    up = share > ((noise >> 8) & 0xFFFFFF).float() * 2.0**-24
    rounded = torch.where(magnitude < _SMALLEST, up.int() * _SMALLEST, rounded)
    return narrow(_finish(bits, magnitude, rounded, saturate), x.dtype)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    table = encode_table(x.device)

    def encoded(part: torch.Tensor) -> torch.Tensor:
        # The upper twelve bits of a float32 are those of its BF16.
        return table[((round_float32(part.float(), saturate).view(torch.int32) >> 20) & 0xFFF).long()]

    return in_parts(encoded, torch.uint8, x.contiguous().view(-1)).view(x.shape)


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return look_up(codes, decode_table(dtype, codes.device))


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of each uint8 code in ``table`` [256]."""
    return in_parts(lambda part: table[part.long()], table.dtype, codes.contiguous().view(-1)).view(codes.shape)


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=1).float() if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float32)


def absmax_to_scale(absmax: torch.Tensor, goal: float, power_of_two: bool) -> torch.Tensor:
    """The scale that brings each absmax to ``goal``, or the smallest power of two that brings it no higher.

    1 for a slice of zeros (or one whose scale would vanish), NaN for a slice that is not finite: on purpose the
    whole slice turns NaN, so that a broken activation cannot look repaired.
    """
    # By a tensor: some devices divide by a number as a product with its reciprocal, another scale in the last bit.
    scale = absmax / torch.full_like(absmax, goal)
    if power_of_two:
        # frexp, not log2, which is wrong just below powers of two: x = m 2^e with 0.5 <= m < 1.
        mantissa, exponent = torch.frexp(scale)
        scale = two_to(exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(torch.isfinite(absmax), torch.where(scale == 0, 1.0, scale), torch.nan)


def two_to(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent as float32, from -149 on: by its bits, because ``ldexp`` is a power function on some devices."""
    exponent = exponent.to(torch.int32)
    normal = (exponent + 127) << 23
    subnormal = 1 << (exponent + 149).clamp(0, 22)
    return torch.where(exponent >= -126, normal, subnormal).to(torch.int32).view(torch.float32)


def times(x: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """A matrix in float32, each column times its factor, a power of two."""
    return x.float() if factors is None else x.float() * factors


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    over = torch.zeros((), dtype=torch.int64, device=x.device)

    def rounded(part: torch.Tensor, by_row: torch.Tensor) -> torch.Tensor:
        nonlocal over
        scaled = times(part, factors) / (by_row[:, None] if by_row.ndim else by_row)
        over = over + (scaled.abs() >= OVERFLOW).sum()
        return narrow(round_float32(scaled, saturate), torch.bfloat16)

    return in_parts(rounded, torch.bfloat16, x.contiguous(), scale), over


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [x] if x.is_meta else x.split(_rows_at_once(x))
    absmax = torch.cat([absmax_rows(times(part, factors)) for part in parts])
    scale = absmax_to_scale(absmax, goal, power_of_two)
    return scaled_round_hif8(x, scale, saturate, factors)[0], scale


def carry_e4m3(values: torch.Tensor, lift: float) -> tuple[torch.Tensor, torch.Tensor]:
    if values.is_meta:  # shapes alone: a table made while tracing would not be one of numbers
        return values.new_empty(values.shape, dtype=torch.uint8), values.new_empty(2, dtype=torch.int64)
    table = carry_table(lift, values.device)

    def found(part: torch.Tensor) -> torch.Tensor:
        return table[((part.view(torch.int16) >> 4) & 0xFFF).long()]

    entries = in_parts(found, table.dtype, values.contiguous().view(-1)).view(values.shape)
    return (entries & 0xFF).to(torch.uint8), counted((entries >> 8).sum(), entries.numel())


def counted(found: torch.Tensor, among: int) -> torch.Tensor:
    """int64 [2]."""
    return torch.stack([found, torch.full_like(found, among)])


def quantize_rows_coded(
    x: torch.Tensor,
    kind: int,
    goal: float,
    power_of_two: bool,
    lift: float,
    divisor: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if kind == CODED_HIF8:
        # By the device's own op, which is quicker.
        values, scale = torch.ops.wanquant.quantize_rows_hif8.default(x, goal, power_of_two, False, factors)
        codes, lost = torch.ops.wanquant.carry_e4m3.default(values, lift)
        return codes, scale / divisor, lost
    x = times(x, factors)
    scale = absmax_to_scale(absmax_rows(x), goal, power_of_two)
    scaled = x / scale[:, None]
    if kind == CODED_E4M3:
        codes = scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = torch.where(scaled.isnan(), NAN_E4M3, codes)
    else:
        codes = scaled.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    return codes, scale / divisor, counted(torch.zeros((), dtype=torch.int64, device=x.device), x.numel())


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    def scaled(part: torch.Tensor, by_row: torch.Tensor) -> torch.Tensor:
        values = part.float() * (by_row[:, None] if by_row.ndim else by_row) * column_scale
        rounded = (values if bias is None else values + bias).to(dtype)
        return rounded.masked_fill(rounded.isnan(), torch.nan)  # torch's own cast to BF16 has two kinds of it

    return in_parts(scaled, dtype, product.contiguous(), row_scale)
