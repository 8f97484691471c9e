"""numba loops over bit patterns: what the CPU kernels run, on one thread, without the GIL.

The outer loops take ``first`` and ``past``, the elements or rows to do, then tensors as their addresses, which
costs a tenth of making NumPy arrays of them, and on the small linears of tiny-wan that is what counts. The functions
they are made of read the type of the patterns, uint16 for BF16 or uint32 for float32, off their arguments.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from numba import carray

from wanquant.kernels.emit import (
    encode_bits,
    magnitude_of,
    pointer,
    round_bits,
    round_bits_by,
    to_bits,
    to_float,
    widen,
)

INF_BITS = np.uint32(0x7F800000)
#: 40960, from which rounding overflows.
OVERFLOW_BITS = np.uint32((142 << 23) | (1 << 21))
#: The unsigned integers whose bits are those of the type.
WORDS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}

njit = partial(numba.njit, nogil=True, cache=True, boundscheck=False, error_model="numpy")


@njit
def scale_of(absmax, goal, power_of_two):
    """The scale of a slice by the pattern of its absmax: ``wanquant.kernels.eager.absmax_to_scale`` in integers."""
    if absmax >= INF_BITS:
        return np.float32(np.nan)
    scale = to_float(absmax) / np.float32(goal)
    if power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = np.float32(math.ldexp(1.0, exponent - (1 if mantissa == 0.5 else 0)))
    return np.float32(1.0) if scale == np.float32(0.0) else scale


@njit(inline="always")
def bfloat16_of(bits):
    """The BF16 pattern of a float32 pattern, ties to even."""
    if bits & np.uint32(0x7FFFFFFF) > INF_BITS:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit
def _largest(row):
    """The float32 pattern of the largest magnitude. Compared in the row's own words, which makes vectors twice as long
    for BF16."""
    best = row.dtype.type(0)
    for column in range(len(row)):
        best = max(best, magnitude_of(row[column]))
    return widen(best)


@njit
def _largest_product(row, factor):
    """The same of what the row is after each column is multiplied by its factor."""
    best = np.uint32(0)
    for column in range(len(row)):
        best = max(best, magnitude_of(to_bits(to_float(widen(row[column])) * factor[column])))
    return best


@njit
def _round_row(row, factor, divisor, saturate, target, over):
    """Rounds ``row · factor / divisor`` to BF16 patterns in ``target``; ``over`` [1] gets how many overflowed. Compiled
    apart where ``factor`` or ``over`` is None: a condition inside of the loop would keep it from vectors."""
    beyond = np.uint32(0)
    for column in range(len(row)):
        value = to_float(widen(row[column]))
        if factor is not None:
            value *= factor[column]
        bits = to_bits(value / divisor)
        if over is not None:
            magnitude = magnitude_of(bits)
            beyond += np.uint32((magnitude >= OVERFLOW_BITS) & (magnitude <= INF_BITS))
        target[column] = np.uint16(round_bits(bits, saturate) >> np.uint32(16))
    if over is not None:
        over[0] = beyond


def _element_loops(word: type) -> dict[str, Any]:
    @njit
    def round_(first, past, source, target, saturate):
        x, y = carray(pointer(source), past, word)[first:], carray(pointer(target), past, word)[first:]
        for i in range(len(x)):
            y[i] = round_bits(x[i], saturate)

    @njit
    def encode(first, past, source, target, saturate):
        x, y = carray(pointer(source), past, word)[first:], carray(pointer(target), past, np.uint8)[first:]
        for i in range(len(x)):
            y[i] = encode_bits(round_bits(x[i], saturate))

    @njit
    def decode(first, past, source, target, values):
        x, y = carray(pointer(source), past, np.uint8)[first:], carray(pointer(target), past, word)[first:]
        table = carray(pointer(values), 256, word)
        for i in range(len(x)):
            y[i] = table[x[i]]

    return {"round": round_, "encode": encode, "decode": decode}


@njit
def carry(first, past, source, target, entries, lost, columns):
    """Codes of BF16 values by the entries of their upper twelve bits; ``lost`` [rows] counts entries beyond 255."""
    x = carray(pointer(source), (past, columns), np.uint16)
    y = carray(pointer(target), (past, columns), np.uint8)
    table, counts = carray(pointer(entries), 4096, np.uint16), carray(pointer(lost), past, np.int64)
    for row in range(first, past):
        count = 0
        for column in range(columns):
            entry = table[x[row, column] >> 4]
            y[row, column] = entry & 0xFF
            count += entry >> 8
        counts[row] = count


def _row_loops(word: type) -> dict[str, Any]:
    """``factors``, by which columns are multiplied first, may be None."""

    @njit
    def absmax_rows(first, past, source, target, columns):
        x, y = carray(pointer(source), (past, columns), word), carray(pointer(target), past, np.uint32)
        for row in range(first, past):
            y[row] = _largest(x[row])

    @njit
    def scaled_round(first, past, source, factors, scales, stride, target, over, columns, saturate):
        """``scales`` holds one float32 a row (``stride`` 1) or one for all (``stride`` 0); ``over`` counts per row."""
        x, y = carray(pointer(source), (past, columns), word), carray(pointer(target), (past, columns), np.uint16)
        scale, overflows = carray(pointer(scales), past, np.float32), carray(pointer(over), past, np.int64)
        factor = None
        if factors is not None:
            factor = carray(pointer(factors), columns, np.float32)
        for row in range(first, past):
            _round_row(x[row], factor, scale[row * stride], saturate, y[row], overflows[row : row + 1])

    @njit
    def quantize_rows(first, past, source, factors, target, scales, columns, goal, power_of_two, saturate):
        """absmax, scale and rounding of a row while it is in the cache."""
        x, y = carray(pointer(source), (past, columns), word), carray(pointer(target), (past, columns), np.uint16)
        scale, factor = carray(pointer(scales), past, np.float32), None
        if factors is not None:
            factor = carray(pointer(factors), columns, np.float32)
        for row in range(first, past):
            largest = _largest(x[row]) if factors is None else _largest_product(x[row], factor)
            scale[row] = scale_of(largest, goal, power_of_two)
            _round_row(x[row], factor, scale[row], saturate, y[row], None)

    return {"absmax_rows": absmax_rows, "scaled_round": scaled_round, "quantize_rows": quantize_rows}


@njit(inline="always")
def _one_nan(bits):
    return np.uint32(0x7FC00000) if bits & np.uint32(0x7FFFFFFF) > INF_BITS else bits


def _descale_loop(product_word: type, bias_word: type, out_word: type) -> Any:
    """The loop of ``descale`` from patterns of one type to patterns of another. ``bias`` may be None. Columns have no
    stride: an unknown one would keep the loop from vectors."""
    to_bfloat16 = out_word is np.uint16

    @njit
    def descale(first, past, source, row_scales, row_stride, column_scales, bias, target, columns):
        x = carray(pointer(source), (past, columns), product_word)
        y = carray(pointer(target), (past, columns), out_word)
        by_row, by_column = (
            carray(pointer(row_scales), past, np.float32),
            carray(pointer(column_scales), columns, np.float32),
        )
        if bias is not None:
            offset = carray(pointer(bias), columns, bias_word)
        for row in range(first, past):
            factor = by_row[row * row_stride]
            for column in range(columns):
                value = to_float(widen(x[row, column])) * factor * by_column[column]
                if bias is not None:
                    value += to_float(widen(offset[column]))
                y[row, column] = bfloat16_of(to_bits(value)) if to_bfloat16 else _one_nan(to_bits(value))

    return descale


@njit
def stochastic(first, past, source, noise, target, saturate):
    """float32 in and out. Below 2^-22 the choice is between 0 and 2^-22, by 24 of the random bits."""
    x, y = carray(pointer(source), past, np.uint32)[first:], carray(pointer(target), past, np.uint32)[first:]
    random = carray(pointer(noise), past, np.uint32)[first:]
    for i in range(len(x)):
        magnitude = magnitude_of(x[i])
        share = to_float(magnitude) * np.float32(2.0**22)
        up = share > np.float32(random[i] >> np.uint32(8)) * np.float32(2.0**-24)
        tiny = (np.uint32(105 << 23) | (x[i] & np.uint32(0x80000000))) if up else np.uint32(0)
        rounded = round_bits_by(x[i], random[i], saturate)
        y[i] = tiny if magnitude < np.uint32(105 << 23) else rounded


LOOPS = {dtype: SimpleNamespace(**_element_loops(word), **_row_loops(word)) for dtype, word in WORDS.items()}
#: By the types of product, bias and result.
DESCALE = {types: _descale_loop(*(WORDS[each] for each in types)) for types in product(WORDS, repeat=3)}
