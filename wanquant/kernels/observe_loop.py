"""The numba loop behind ``wanquant.kernels.statistics``: all its figures of a matrix, row by row while it is in the
cache. Sums may be taken in any order, or they would not run in vectors.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from wanquant.kernels.emit import magnitude_of, round_bits, to_bits, to_float, widen
from wanquant.kernels.loops import INF_BITS, njit, scale_of

#: Histogram bins in each power of two, and the power the first of them begins at.
PER_OCTAVE, LOWEST = 32, -40
#: Sums of x, x², x³, x⁴ come before the noise of each rule.
MOMENTS = 4

_SHIFT, _BASE = np.uint32(23 - (PER_OCTAVE.bit_length() - 1)), np.int64((127 + LOWEST) * PER_OCTAVE)


@partial(njit, fastmath={"reassoc"})
def _errors(row, divisor):
    """The sum of squared rounding errors of a row."""
    total = np.float32(0)
    for column in range(len(row)):
        value = to_float(widen(row[column]))
        error = value - to_float(round_bits(to_bits(value / divisor), False)) * divisor
        total += error * error
    return total


@partial(njit, fastmath={"reassoc"})
def _powers(row, sums):
    one, two, three, four = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
    for column in range(len(row)):
        value = np.float64(to_float(widen(row[column])))
        square = value * value
        one += value
        two += square
        three += square * value
        four += square * square
    sums[0] += one
    sums[1] += two
    sums[2] += three
    sums[3] += four


@njit
def _count_beyond(row, bound):
    """How many magnitudes are at least this pattern."""
    beyond = np.uint32(0)
    for column in range(len(row)):
        beyond = np.uint32(beyond + np.uint32(magnitude_of(widen(row[column])) >= bound))
    return beyond


@njit
def _count_zones(row, divisor, lowest, zones):
    above = len(row)
    for zone in range(1, len(zones)):
        beyond = _count_beyond(row, to_bits(lowest[zone] * divisor))
        zones[zone - 1] += above - beyond
        above = beyond
    zones[-1] += above


@njit
def _channels(row, absmax, square):
    """The row's part in each channel's largest magnitude and energy; its own largest magnitude is returned."""
    best = np.uint32(0)
    for column in range(len(row)):
        magnitude = magnitude_of(widen(row[column]))
        best = max(best, magnitude)
        value = to_float(magnitude)
        absmax[column] = to_float(max(to_bits(absmax[column]), magnitude))
        square[column] += value * value
    return best


@njit
def _count_bins(row, counts):
    """The last two count what is infinite and what is NaN."""
    last = len(counts) - 3
    for column in range(len(row)):
        magnitude = magnitude_of(widen(row[column]))
        index = min(max(np.int64(magnitude >> _SHIFT) - _BASE + 1, 0), last)
        if magnitude >= INF_BITS:
            index = last + 1 + (magnitude > INF_BITS)
        counts[index] += 1


@njit
def observe(x, absmax, goals, powers_of_two, per_row, lowest, counts, zones, sums, channel_absmax, channel_square):
    """Adds up the figures of ``x``, patterns [rows, columns]. ``absmax`` is the pattern of the largest magnitude of the
    tensor these rows are from; ``goals`` and what follows are of the dynamic rules."""
    for index in range(len(x)):
        row = x[index]  # and not by iterating over x, which forgets that rows are contiguous: five times slower
        best = _channels(row, channel_absmax, channel_square)
        _count_bins(row, counts)
        _powers(row, sums)
        for rule in range(len(goals)):
            divisor = scale_of(best if per_row[rule] else absmax, goals[rule], powers_of_two[rule] != 0)
            sums[MOMENTS + rule] += _errors(row, divisor)
            if rule == 0 and divisor == divisor:
                _count_zones(row, divisor, lowest, zones)
