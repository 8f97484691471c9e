"""numba loops over bit patterns: what the CPU kernels run, on one thread, without the GIL.

The rounding itself is emitted as LLVM instructions of the pattern's own width (``_emit_round``), because
numba widens every integer to 64 bits: on 16-bit lanes a vector holds four times as many BF16 values.
Tensors are passed as addresses, which costs a tenth of making NumPy arrays of them, and on the small
linears of tiny-wan that is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from wanquant.kernels.tables import INF_CODE, NAN_CODE

_INF_BITS = np.uint32(0x7F800000)
#: 40960, from which rounding overflows.
_OVERFLOW_BITS = np.uint32((142 << 23) | (1 << 21))
#: The unsigned integers whose bits are those of the type.
_WORDS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}

_njit = partial(numba.njit, nogil=True, cache=True, boundscheck=False, error_model="numpy")


def _emit_round(builder: ir.IRBuilder, bits: ir.Value, noise: ir.Value | None, saturate: ir.Value) -> ir.Value:
    """HiF8 rounding of one BF16 (i16) or float32 (i32) pattern, in instructions of that width.

    Add half a unit of the last place kept (or ``noise``, uniform bits, shifted to be below one unit), cut the
    rest. The carry into the exponent is right, because the power of two it reaches is in every zone.
    """
    word = bits.type
    mantissa = 7 if word.width == 16 else 23

    def constant(value: int) -> ir.Constant:
        return ir.Constant(word, value)

    def power(exponent: int) -> ir.Constant:
        return constant((exponent + 127) << mantissa)

    sign_bit, inf, less = 1 << (word.width - 1), power(128), partial(builder.icmp_unsigned, "<")
    magnitude = builder.and_(bits, constant(sign_bit - 1))
    # How many bits go: all but 3 for exponents within ±3, all but 2 within ±7, all but 1 within ±15.
    drop = constant(mantissa)
    for bound, kept in ((15, 1), (7, 2), (3, 3)):
        inside = less(builder.sub(magnitude, power(-bound)), constant((2 * bound + 1) << mantissa))
        drop = builder.select(inside, constant(mantissa - kept), drop)
    unit = builder.shl(constant(1), drop)
    if noise is None:
        below_unit = builder.lshr(unit, constant(1))
    else:
        below_unit = builder.and_(noise, builder.sub(unit, constant(1)))
    rounded = builder.and_(builder.add(magnitude, below_unit), builder.neg(unit))
    if noise is None:
        rounded = builder.select(less(rounded, power(-22)), power(-22), rounded)
        rounded = builder.select(less(magnitude, power(-23)), constant(0), rounded)
    over = builder.select(saturate, power(15), inf)
    rounded = builder.select(less(power(15), rounded), over, rounded)
    rounded = builder.select(builder.icmp_unsigned("==", magnitude, inf), inf, rounded)
    signed = builder.or_(rounded, builder.and_(bits, constant(sign_bit)))
    signed = builder.select(builder.icmp_unsigned("==", rounded, constant(0)), rounded, signed)
    quiet = constant((0xFF << mantissa) | 1 << (mantissa - 1))
    return builder.select(less(inf, magnitude), quiet, signed)


def _emit_encode(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The code (i8) of a rounded BF16 pattern (i16), in instructions of that width; a look-up in a table would be one
    load after the other.

    Within a zone of k mantissa bits and one sign of the exponent, codes are consecutive: they rise with the
    pattern where exponents are positive, and where they are negative exponents fall while mantissas still rise.
    """
    word = ir.IntType(16)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(word, value & 0xFFFF)

    def power(exponent: int) -> ir.Constant:
        return constant((exponent + 127) << 7)

    magnitude = builder.and_(bits, constant(0x7FFF))
    negative = builder.icmp_unsigned("<", magnitude, power(0))
    # Powers of two below 2^-15: codes 1 to 7, and 0 for zero, whose exponent is below all of them.
    steps = builder.lshr(magnitude, constant(7))
    code = builder.sub(
        builder.select(builder.icmp_unsigned("<", steps, constant(104)), constant(104), steps), constant(104)
    )
    # Smallest |exponent|, bits of the exponent field (its sign's among them), of the mantissa, and first code.
    for low, field, kept, first in ((8, 4, 1, 96), (4, 3, 2, 64), (2, 2, 3, 32), (1, 1, 3, 16), (0, 0, 3, 8)):
        high = 2 * low - 1 if low else 0
        inside = builder.icmp_unsigned("<", builder.sub(magnitude, power(-high)), constant((2 * high + 1) << 7))
        steps = builder.lshr(magnitude, constant(7 - kept))  # exponent and the mantissa bits kept
        rising = builder.add(steps, constant(first - ((127 + low) << kept)))
        if low:
            mantissa = builder.and_(steps, constant((1 << kept) - 1))
            falling = builder.sub(builder.shl(mantissa, constant(1)), steps)
            offset = first + (1 << (field - 1 + kept)) + ((127 - low) << kept)
            rising = builder.select(negative, builder.add(falling, constant(offset)), rising)
        code = builder.select(inside, rising, code)
    inf = power(128)
    code = builder.select(builder.icmp_unsigned("==", magnitude, inf), constant(INF_CODE), code)
    sign = builder.lshr(builder.and_(bits, constant(0x8000)), constant(8))
    code = builder.select(builder.icmp_unsigned("==", magnitude, constant(0)), constant(0), builder.or_(code, sign))
    code = builder.select(builder.icmp_unsigned("<", inf, magnitude), constant(NAN_CODE), code)
    return builder.trunc(code, ir.IntType(8))


@intrinsic
def _encode(context: Any, bits: Any) -> Any:
    """encode(rounded: uint16) -> uint8."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return _emit_encode(builder, args[0])

    return types.uint8(types.uint16), emit


@intrinsic
def _round(context: Any, bits: Any, saturate: Any) -> Any:
    """round(bits: uint16 or uint32, saturate: bool) of the same type."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return _emit_round(builder, args[0], None, args[1])

    return bits(bits, saturate), emit


@intrinsic
def _round_by(context: Any, bits: Any, noise: Any, saturate: Any) -> Any:
    """Stochastic rounding of a uint32 pattern of at least 2^-22 in magnitude, by 32 random bits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return _emit_round(builder, args[0], args[1], args[2])

    return bits(bits, noise, saturate), emit


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), emit


@intrinsic
def _to_float(context: Any, bits: Any) -> Any:
    """The float32 of a uint32 pattern."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@intrinsic
def _to_bits(context: Any, value: Any) -> Any:
    """The uint32 pattern of a float32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@_njit
def _scale_of(absmax, goal, power_of_two):
    """The scale of a slice by the pattern of its absmax: ``wanquant.kernels.eager.absmax_to_scale`` in integers."""
    if absmax >= _INF_BITS:
        return np.float32(np.nan)
    scale = _to_float(absmax) / np.float32(goal)
    if power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = np.float32(math.ldexp(1.0, exponent - (1 if mantissa == 0.5 else 0)))
    return np.float32(1.0) if scale == np.float32(0.0) else scale


@_njit(inline="always")
def _bfloat16(bits):
    """The BF16 pattern of a float32 pattern, ties to even."""
    if bits & np.uint32(0x7FFFFFFF) > _INF_BITS:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def _element_loops(word: type) -> dict[str, Any]:
    """Loops over patterns of BF16 (``word`` uint16) or float32 (uint32). All arrays come as addresses."""
    narrow = np.uint32(16 if word is np.uint32 else 0)

    @_njit
    def round_(source, target, count, saturate):
        x, y = carray(_pointer(source), count, word), carray(_pointer(target), count, word)
        for i in range(count):
            y[i] = _round(x[i], saturate)

    @_njit
    def encode(source, target, count, saturate):
        x, y = carray(_pointer(source), count, word), carray(_pointer(target), count, np.uint8)
        for i in range(count):
            y[i] = _encode(np.uint16(_round(x[i], saturate) >> narrow))

    @_njit
    def decode(source, target, count, values):
        x, y = carray(_pointer(source), count, np.uint8), carray(_pointer(target), count, word)
        table = carray(_pointer(values), 256, word)
        for i in range(count):
            y[i] = table[x[i]]

    return {"round": round_, "encode": encode, "decode": decode}


def _row_loops(word: type, factored: bool) -> dict[str, Any]:
    """Loops over matrices of such patterns, row by row. ``factored``: each column is multiplied by its factor first,
    in a loop of its own, because a condition inside one would keep it from vectors."""
    wide = np.uint32(0 if word is np.uint32 else 16)
    magnitude_bits = word(0x7FFFFFFF >> wide)

    @_njit
    def absmax_rows(source, target, rows, columns):
        x, y = carray(_pointer(source), (rows, columns), word), carray(_pointer(target), rows, np.uint32)
        for row in range(rows):
            best = word(0)
            for column in range(columns):
                best = max(best, x[row, column] & magnitude_bits)
            y[row] = np.uint32(best) << wide

    @_njit
    def scaled_round(source, scales, stride, target, over, rows, columns, saturate, factors):
        """``scales`` holds one float32 a row (``stride`` 1) or one for all (``stride`` 0); ``over`` counts per row."""
        x, y = carray(_pointer(source), (rows, columns), word), carray(_pointer(target), (rows, columns), np.uint16)
        scale, overflows = carray(_pointer(scales), rows, np.float32), carray(_pointer(over), rows, np.int64)
        factor = carray(_pointer(factors), columns, np.float32)
        for row in range(rows):
            divisor, beyond = scale[row * stride], np.uint32(0)
            for column in range(columns):
                value = _to_float(np.uint32(x[row, column]) << wide)
                if factored:
                    value *= factor[column]
                bits = _to_bits(value / divisor)
                magnitude = bits & np.uint32(0x7FFFFFFF)
                beyond += np.uint32((magnitude >= _OVERFLOW_BITS) & (magnitude <= _INF_BITS))
                y[row, column] = np.uint16(_round(bits, saturate) >> np.uint32(16))
            overflows[row] = beyond

    @_njit
    def quantize_rows(source, target, scales, rows, columns, goal, power_of_two, saturate, factors):
        """absmax, scale and rounding of a row while it is in the cache."""
        x, y = carray(_pointer(source), (rows, columns), word), carray(_pointer(target), (rows, columns), np.uint16)
        scale, factor = carray(_pointer(scales), rows, np.float32), carray(_pointer(factors), columns, np.float32)
        for row in range(rows):
            if factored:
                largest = np.uint32(0)
                for column in range(columns):
                    value = _to_float((np.uint32(x[row, column]) << wide) & np.uint32(0x7FFFFFFF)) * factor[column]
                    largest = max(largest, _to_bits(value))
            else:
                best = word(0)
                for column in range(columns):
                    best = max(best, x[row, column] & magnitude_bits)
                largest = np.uint32(best) << wide
            divisor = _scale_of(largest, goal, power_of_two)
            scale[row] = divisor
            for column in range(columns):
                value = _to_float(np.uint32(x[row, column]) << wide)
                if factored:
                    value *= factor[column]
                bits = _to_bits(value / divisor)
                y[row, column] = np.uint16(_round(bits, saturate) >> np.uint32(16))

    return {"absmax_rows": absmax_rows, "scaled_round": scaled_round, "quantize_rows": quantize_rows}


def _descale_loop(product_word: type, bias_word: type, out_word: type) -> Any:
    """The loop of ``descale`` from patterns of one type to patterns of another."""
    wide = np.uint32(0 if product_word is np.uint32 else 16)
    bias_wide = np.uint32(0 if bias_word is np.uint32 else 16)
    narrow_out = out_word is np.uint16

    @_njit
    def descale(source, row_scales, row_stride, column_scales, bias, has_bias, target, rows, columns):
        """Two loops and no stride for columns: a condition or an unknown stride within would keep them from vectors."""
        x = carray(_pointer(source), (rows, columns), product_word)
        y = carray(_pointer(target), (rows, columns), out_word)
        by_row = carray(_pointer(row_scales), rows, np.float32)
        by_column = carray(_pointer(column_scales), columns, np.float32)
        offset = carray(_pointer(bias), columns, bias_word)
        for row in range(rows):
            factor = by_row[row * row_stride]
            if has_bias:
                for column in range(columns):
                    value = _to_float(np.uint32(x[row, column]) << wide) * factor * by_column[column]
                    bits = _to_bits(value + _to_float(np.uint32(offset[column]) << bias_wide))
                    y[row, column] = _bfloat16(bits) if narrow_out else bits
            else:
                for column in range(columns):
                    bits = _to_bits(_to_float(np.uint32(x[row, column]) << wide) * factor * by_column[column])
                    y[row, column] = _bfloat16(bits) if narrow_out else bits

    return descale


LOOPS = {dtype: SimpleNamespace(**_element_loops(word), **_row_loops(word, False)) for dtype, word in _WORDS.items()}
#: The same, multiplying each column by its factor.
FACTORED = {dtype: SimpleNamespace(**_row_loops(word, True)) for dtype, word in _WORDS.items()}
#: By the types of product, bias and result.
DESCALE = {types_: _descale_loop(*(_WORDS[t] for t in types_)) for types_ in product(_WORDS, repeat=3)}


@_njit
def stochastic(source, noise, target, count, saturate):
    """float32 in and out. Below 2^-22 the choice is between 0 and 2^-22, by 24 of the random bits."""
    x, y = carray(_pointer(source), count, np.uint32), carray(_pointer(target), count, np.uint32)
    random = carray(_pointer(noise), count, np.uint32)
    for i in range(count):
        magnitude = x[i] & np.uint32(0x7FFFFFFF)
        share = _to_float(magnitude) * np.float32(2.0**22)
        up = share > np.float32(random[i] >> np.uint32(8)) * np.float32(2.0**-24)
        tiny = (np.uint32(105 << 23) | (x[i] & np.uint32(0x80000000))) if up else np.uint32(0)
        rounded = _round_by(x[i], random[i], saturate)
        y[i] = tiny if magnitude < np.uint32(105 << 23) else rounded
