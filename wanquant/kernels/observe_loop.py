"""The numba loop behind ``wanquant.kernels.statistics``: all its figures of a matrix, row by row while it is in the
cache. Sums may be taken in any order, or they would not run in vectors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import carray

from wanquant.kernels.loops import _INF_BITS, _WORDS, _njit, _pointer, _round, _scale_of, _to_bits, _to_float

#: Histogram bins in each power of two, and the power the first of them begins at.
PER_OCTAVE, LOWEST = 32, -40
#: Sums of x, x², x³, x⁴ come before the noise of each rule.
MOMENTS = 4


def _observe_loop(word: type) -> Any:
    """For patterns of BF16 (``word`` uint16) or float32 (uint32)."""
    wide = np.uint32(0 if word is np.uint32 else 16)
    magnitude_bits = np.uint32(0x7FFFFFFF)
    shift, base = np.uint32(23 - (PER_OCTAVE.bit_length() - 1)), np.int64((127 + LOWEST) * PER_OCTAVE)

    @partial(_njit, fastmath={"reassoc"})
    def errors(x, row, columns, divisor):
        """The sum of squared rounding errors of a row."""
        total = np.float32(0)
        for column in range(columns):
            value = _to_float(np.uint32(x[row, column]) << wide)
            error = value - _to_float(_round(_to_bits(value / divisor), False)) * divisor
            total += error * error
        return total

    @partial(_njit, fastmath={"reassoc"})
    def powers(x, row, columns, sums):
        one, two, three, four = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
        for column in range(columns):
            value = np.float64(_to_float(np.uint32(x[row, column]) << wide))
            square = value * value
            one += value
            two += square
            three += square * value
            four += square * square
        sums[0] += one
        sums[1] += two
        sums[2] += three
        sums[3] += four

    @_njit
    def count_zones(x, row, columns, divisor, lowest, zones):
        """One pass, so the seven bounds between the eight zones are written out."""
        b1, b2, b3 = (_to_bits(lowest[1] * divisor), _to_bits(lowest[2] * divisor), _to_bits(lowest[3] * divisor))
        b4, b5, b6 = (_to_bits(lowest[4] * divisor), _to_bits(lowest[5] * divisor), _to_bits(lowest[6] * divisor))
        b7 = _to_bits(lowest[7] * divisor)
        n1, n2, n3, n4, n5, n6, n7 = 0, 0, 0, 0, 0, 0, 0
        for column in range(columns):
            magnitude = (np.uint32(x[row, column]) << wide) & magnitude_bits
            n1 += magnitude >= b1
            n2 += magnitude >= b2
            n3 += magnitude >= b3
            n4 += magnitude >= b4
            n5 += magnitude >= b5
            n6 += magnitude >= b6
            n7 += magnitude >= b7
        above = columns
        for zone, beyond in enumerate((n1, n2, n3, n4, n5, n6, n7)):
            zones[zone] += above - beyond
            above = beyond
        zones[7] += above

    @_njit
    def largest(x, rows, columns):
        """In the tensor's own words, which makes vectors twice as long for BF16."""
        best = word(0)
        for row in range(rows):
            for column in range(columns):
                best = max(best, x[row, column] & word(magnitude_bits >> wide))
        return np.uint32(best) << wide

    @_njit
    def channels(x, row, columns, absmax, square):
        """The row's part in each channel's largest magnitude and energy; its own largest magnitude is returned."""
        best = np.uint32(0)
        for column in range(columns):
            magnitude = (np.uint32(x[row, column]) << wide) & magnitude_bits
            best = max(best, magnitude)
            value = _to_float(magnitude)
            absmax[column] = _to_float(max(_to_bits(absmax[column]), magnitude))
            square[column] += value * value
        return best

    @_njit
    def count_bins(x, row, columns, counts):
        """The last two count what is infinite and what is NaN."""
        last = len(counts) - 3
        for column in range(columns):
            magnitude = (np.uint32(x[row, column]) << wide) & magnitude_bits
            index = min(max(np.int64(magnitude >> shift) - base + 1, 0), last)
            if magnitude >= _INF_BITS:
                index = last + 1 + (magnitude > _INF_BITS)
            counts[index] += 1

    @_njit
    def observe(
        source, rows, columns, absmax, absmax_known, goals, powers_of_two, per_row, lowest,
        counts, zones, sums, channel_absmax, channel_square,
    ):  # fmt: skip
        x = carray(_pointer(source), (rows, columns), word)
        if not absmax_known:
            absmax = largest(x, rows, columns)
        for row in range(rows):
            best = channels(x, row, columns, channel_absmax, channel_square)
            count_bins(x, row, columns, counts)
            powers(x, row, columns, sums)
            for rule in range(len(goals)):
                divisor = _scale_of(best if per_row[rule] else absmax, goals[rule], powers_of_two[rule] != 0)
                sums[MOMENTS + rule] += errors(x, row, columns, divisor)
                if rule == 0 and divisor == divisor:
                    count_zones(x, row, columns, divisor, lowest, zones)
        return _to_float(absmax)

    return observe


OBSERVE = {dtype: _observe_loop(word) for dtype, word in _WORDS.items()}
