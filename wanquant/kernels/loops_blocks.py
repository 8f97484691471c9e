"""numba loops over rows whose blocks share a scale: ``wanquant.kernels.blocks`` on the CPU, on one thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import carray

from wanquant.kernels.blocks import (
    LARGEST_LEVEL,
    LARGEST_SCALE,
    SCALE_BF16,
    SCALE_E8M0,
    SCALE_HIF4,
    SEVENTH,
    SMALLEST_LEVEL,
)
from wanquant.kernels.emit import magnitude_of, pointer, to_bits, to_float, widen
from wanquant.kernels.loops import INF_BITS, WORDS, bfloat16_of, njit

_EXPONENT = np.uint32(0x7F800000)
_SIGN = np.uint32(0x80000000)
_MIDDLE = np.uint32(0x00400000)


@njit(inline="always")
def _to_grid(magnitude, shift, least, largest):
    """``wanquant.kernels.blocks.round_element``. A number of 1.5 · 2^23 steps is added and taken away, which leaves
    whole steps; ``shift`` is 23 less the mantissa bits and ``least`` the smallest normal, as exponent fields."""
    magnitude = min(magnitude, largest)
    exponent = np.uint32(max(to_bits(magnitude) & _EXPONENT, least))
    steps = to_float(np.uint32((exponent + shift) | _MIDDLE))
    return (magnitude + steps) - steps


@njit
def _scale_of(absmax, kind, largest, top):
    if kind == SCALE_E8M0:
        # Down from the exponent of the largest magnitude; 2^-127 is subnormal. Subnormal magnitudes are below it.
        field = np.int64(to_bits(absmax) >> np.uint32(23)) - top
        return to_float(np.uint32(np.uint32(field) << np.uint32(23))) if field > 0 else to_float(np.uint32(0x00400000))
    wanted = absmax / largest
    if kind == SCALE_BF16:
        return to_float(np.uint32(np.uint32(bfloat16_of(to_bits(wanted))) << np.uint32(16)))
    return _to_grid(wanted, np.uint32(20 << 23), np.uint32(121 << 23), np.float32(LARGEST_SCALE))


@njit
def _round_block(scaled, kind, shift, least, largest, top, target):
    """Of ``scaled``, float32, to BF16 patterns."""
    highest = np.uint32(0)
    for i in range(len(scaled)):
        highest = max(highest, magnitude_of(to_bits(scaled[i])))
    if highest >= INF_BITS:
        for i in range(len(scaled)):
            target[i] = np.uint16(0x7FC0)
        return
    scale = _scale_of(to_float(np.uint32(highest)), kind, largest, top)
    if scale == np.float32(0.0):
        for i in range(len(scaled)):
            target[i] = np.uint16((to_bits(scaled[i]) & _SIGN) >> np.uint32(16)) if kind != SCALE_BF16 else np.uint16(0)
        return
    if kind == SCALE_BF16:
        for i in range(len(scaled)):
            bits = to_bits(scaled[i])
            rounded = to_bits(_to_grid(to_float(magnitude_of(bits)) / scale, shift, least, largest) * scale)
            sign = np.uint32(bits & _SIGN) if rounded != np.uint32(0) else np.uint32(0)
            target[i] = bfloat16_of(np.uint32(rounded | sign))
        return
    for i in range(len(scaled)):
        bits = to_bits(scaled[i])
        rounded = _to_grid(to_float(magnitude_of(bits)) / scale, shift, least, largest) * scale
        target[i] = bfloat16_of(np.uint32(to_bits(rounded) | (bits & _SIGN)))


@njit
def _level_of(highest):
    """HiF4's first level by the pattern of a block's largest magnitude."""
    seventh = bfloat16_of(to_bits(to_float(np.uint32(highest)) * np.float32(SEVENTH)))
    wanted = max(to_float(np.uint32(np.uint32(seventh) << np.uint32(16))), np.float32(SMALLEST_LEVEL))
    return _to_grid(wanted, np.uint32(21 << 23), np.uint32(79 << 23), np.float32(LARGEST_LEVEL))


@njit
def _round_hif4(scaled, target):
    """Of 64 of them."""
    fours = np.empty(16, np.uint32)
    highest = np.uint32(0)
    for four in range(16):
        best = np.uint32(0)
        for i in range(4 * four, 4 * four + 4):
            best = max(best, magnitude_of(to_bits(scaled[i])))
        fours[four] = best
        highest = max(highest, best)
    if highest >= INF_BITS:
        for i in range(64):
            target[i] = np.uint16(0x7FC0)
        return
    level = _level_of(highest)
    reciprocal = to_float(np.uint32(np.uint32(bfloat16_of(to_bits(np.float32(1.0) / level))) << np.uint32(16)))
    for eight in range(8):
        reached = to_float(np.uint32(max(fours[2 * eight], fours[2 * eight + 1]))) * reciprocal
        doubled = np.float32(2.0) if reached >= np.float32(4.0) else np.float32(1.0)
        for four in range(2 * eight, 2 * eight + 2):
            power = doubled
            if to_float(fours[four]) * reciprocal / doubled >= np.float32(2.0):
                power *= np.float32(2.0)
            by, unit = reciprocal / power, level * power * np.float32(0.25)
            for i in range(4 * four, 4 * four + 4):
                bits = to_bits(scaled[i])
                quarters = min(to_float(magnitude_of(bits)) * by * np.float32(4.0) + np.float32(0.5), np.float32(7.0))
                value = np.float32(np.int32(quarters)) * unit
                target[i] = bfloat16_of(np.uint32(to_bits(value) | (bits & _SIGN)))


def _loop(word: type) -> Any:
    @njit
    def round_blocks(
        first, past, source, factors, scales, stride, target, over, columns,
        block, kind, shift, least, largest, top, limit,
    ):  # fmt: skip
        """``scales`` holds one float32 a row (``stride`` 1) or one for all (0); ``over`` counts per row."""
        x, y = carray(pointer(source), (past, columns), word), carray(pointer(target), (past, columns), np.uint16)
        scale, overflows = carray(pointer(scales), past, np.float32), carray(pointer(over), past, np.int64)
        scaled = np.empty(block, np.float32)
        for row in range(first, past):
            divisor, beyond = scale[row * stride], 0
            for start in range(0, columns, block):
                for i in range(block):
                    value = to_float(widen(x[row, start + i]))
                    if factors is not None:
                        value *= carray(pointer(factors), columns, np.float32)[start + i]
                    scaled[i] = value / divisor
                for i in range(block):
                    beyond += abs(scaled[i]) >= limit
                if kind == SCALE_HIF4:
                    _round_hif4(scaled, y[row, start : start + block])
                else:
                    _round_block(scaled, kind, shift, least, largest, top, y[row, start : start + block])
            overflows[row] = beyond

    return round_blocks


BLOCK_LOOPS = {dtype: SimpleNamespace(round=_loop(word)) for dtype, word in WORDS.items()}


@njit(inline="always")
def _index(element, least, drop, base, per):
    """The place of an element among those that are not negative: below the smallest normal value by steps, above it
    by its pattern."""
    bits = to_bits(element)
    if bits < least:
        return np.uint32(element * per)
    return np.uint32((bits >> drop) - base)


@njit
def _signed(index, word, whole, bits):
    """The code of an element by its place and the sign of its value."""
    negative = np.uint32(word >> np.uint16(15))
    if whole:
        return np.uint8((np.uint32(1 << bits) - index) & np.uint32((1 << bits) - 1)) if negative else np.uint8(index)
    return np.uint8(index | (negative << np.uint32(bits - 1)))


@njit
def _split_block(x, kind, shift, least, largest, top, drop, base, per, bits, codes, scales):
    """Whether all are multiples of the scale that ``_round_block`` would take."""
    highest = np.uint32(0)
    for i in range(len(x)):
        highest = max(highest, magnitude_of(widen(x[i])))
    broken = highest >= INF_BITS
    scale = np.float32(0.0) if broken else _scale_of(to_float(np.uint32(highest)), kind, largest, top)
    pattern, held = to_bits(scale), True
    if kind == SCALE_BF16:
        half = np.uint32(0x7FC0) if broken else pattern >> np.uint32(16)
        scales[0], scales[1] = np.uint8(half & np.uint32(255)), np.uint8(half >> np.uint32(8))
    elif kind == SCALE_E8M0:
        scales[0] = np.uint8(255) if broken else np.uint8(pattern >> np.uint32(23))
    elif broken:
        scales[0] = np.uint8(127)
    else:
        place = _index(scale, np.uint32(121 << 23), np.uint32(20), np.uint32(120 << 3), np.float32(512.0))
        scales[0] = np.uint8(place)
    for i in range(len(x)):
        if broken:
            codes[i] = np.uint8(0)
            continue
        magnitude = to_float(magnitude_of(widen(x[i])))
        element = np.float32(0.0)
        if scale != np.float32(0.0):
            element = _to_grid(magnitude / scale, shift, least, largest)
        product = to_bits(element * scale)
        if kind == SCALE_BF16:
            product = np.uint32(np.uint32(bfloat16_of(product)) << np.uint32(16))
        held = held and product == to_bits(magnitude)
        codes[i] = _signed(_index(element, least, drop, base, per), x[i], kind == SCALE_BF16, bits)
    return held


@njit
def _shift_of(x, level):
    """The flags of the powers, 1, 2 and 4, of which with the level four elements are multiples."""
    found = 7
    for i in range(len(x)):
        quarters = to_float(magnitude_of(widen(x[i]))) / level * np.float32(4.0)
        for power in range(3):
            scaled = quarters / np.float32(1 << power)
            if scaled != np.floor(scaled) or scaled > np.float32(7.0):
                found &= ~(1 << power)
    return found


@njit
def _split_hif4(x, codes, scales):
    highest = np.uint32(0)
    for i in range(64):
        highest = max(highest, magnitude_of(widen(x[i])))
    scales[1] = scales[2] = scales[3] = np.uint8(0)
    if highest >= INF_BITS:
        scales[0] = np.uint8(255)
        codes[:] = np.uint8(0)
        return True
    level, held = _level_of(highest), True
    scales[0] = np.uint8((to_bits(level) >> np.uint32(21)) - np.uint32(79 << 2))
    for eight in range(8):
        middle = 8 * eight + 4
        a, b = _shift_of(x[middle - 4 : middle], level), _shift_of(x[middle : middle + 4], level)
        without = (a & 3) != 0 and (b & 3) != 0
        held = held and (without or ((a & 6) != 0 and (b & 6) != 0))
        if not without:
            scales[1] |= np.uint8(1 << eight)
        for four in range(2):
            fits = b if four else a
            third = (fits & 1) == 0 if without else (fits & 2) == 0
            at = 2 * eight + four
            if third:
                scales[2 + at // 8] |= np.uint8(1 << (at % 8))
            power = np.float32((1 if without else 2) * (2 if third else 1))
            for i in range(4 * at, 4 * at + 4):
                quarters = to_float(magnitude_of(widen(x[i]))) / (level * power) * np.float32(4.0)
                codes[i] = _signed(np.uint32(min(quarters, np.float32(7.0))), x[i], False, 4)
    return held


@njit
def split_loop(
    first, past, source, codes, scales, held, columns,
    block, kind, shift, least, largest, top, drop, base, per, bits, bytes_of_scale,
):  # fmt: skip
    """``wanquant.kernels.blocks.split_blocks``."""
    blocks = columns // block
    x, y = carray(pointer(source), (past, columns), np.uint16), carray(pointer(codes), (past, columns), np.uint8)
    by_block = carray(pointer(scales), (past, blocks * bytes_of_scale), np.uint8)
    fits = carray(pointer(held), (past, blocks), np.uint8)
    for row in range(first, past):
        for at in range(blocks):
            one, out = x[row, block * at : block * at + block], y[row, block * at : block * at + block]
            own = by_block[row, bytes_of_scale * at : bytes_of_scale * at + bytes_of_scale]
            if kind == SCALE_HIF4:
                fits[row, at] = _split_hif4(one, out, own)
            else:
                fits[row, at] = _split_block(
                    one, kind, shift, least, largest, top, drop, base, per, bits, out, own
                )  # fmt: skip
