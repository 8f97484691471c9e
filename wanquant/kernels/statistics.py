"""What passes by, measured in one go: a histogram, moments, and what rounding by several scales would cost.

Every figure of ``Observed`` is a sum or a maximum over elements, so those of two tensors merge into those of both.
The histogram counts magnitudes in bins of equal width within each power of two, ``PER_OCTAVE`` of them: the upper
bits of the pattern are the bin's number. A quantile read from it is within 1 / (2 ``PER_OCTAVE``) of the exact one,
relative, for magnitudes from 2^``LOWEST`` to 2^``HIGHEST``.

A dynamic scale differs from row to row, which a histogram forgets: what such a rule costs is measured as the rows
pass, where rows are to be rounded. What a single scale would cost is worked out from the histogram afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from wanquant.kernels import cpu, eager
from wanquant.kernels.dispatch import check_rows
from wanquant.kernels.loops import WORDS
from wanquant.kernels.observe_loop import LOWEST, MOMENTS, PER_OCTAVE, observe

#: The histogram ends at 2^HIGHEST, beyond what planted outliers reach.
HIGHEST = 48
#: Below 2^LOWEST (zeros too); the bins; finite from 2^HIGHEST on; infinite; NaN.
BINS = (HIGHEST - LOWEST) * PER_OCTAVE + 4
#: Lower ends of what |x / s| may be, by the mantissa bits HiF8 has there: nothing (it becomes 0), a power of two
#: (0 bits), 1, 2, 3, 2, 1, and beyond its range.
ZONES = (0.0, 2.0**-23, 2.0**-15, 2.0**-7, 2.0**-3, 2.0**4, 2.0**8, eager.OVERFLOW)


@dataclass(frozen=True)
class DynamicRule:
    """A scale for each row, or for the whole tensor each time, that brings its largest magnitude to ``target``."""

    name: str
    target: float
    power_of_two: bool
    per_row: bool


#: Whose cost is measured as rows pass. The zones are counted under the first.
DYNAMIC_RULES = (
    DynamicRule("per_token amax/15", 15.0, False, True),
    DynamicRule("per_token amax/8", 8.0, False, True),
    DynamicRule("per_token amax/16", 16.0, False, True),
    DynamicRule("per_token pow2/15", 15.0, True, True),
    DynamicRule("per_tensor amax/15", 15.0, False, False),
)
#: Elements below which a second thread does not pay; this loop does more with each than the others.
_CHUNK = 1 << 17
#: Elements measured at once off the CPU, of which a dozen copies are made.
_AT_ONCE = 1 << 24
SUMS = MOMENTS + len(DYNAMIC_RULES)


@dataclass(frozen=True)
class Observed:
    """Of one matrix [rows, columns]:

    absmax          largest magnitude; NaN where there is one
    counts          int64 [BINS], of magnitudes
    zones           int64 [len(ZONES)], of magnitudes over the scale of the first dynamic rule; zeros without rules
    sums            float64 [SUMS]: of powers of the elements, and of squared rounding errors under each rule (NaN
                    without rules)
    channel_absmax  float32 [columns]
    channel_square  float32 [columns]: sums of squares
    """

    absmax: float
    counts: np.ndarray
    zones: np.ndarray
    sums: np.ndarray
    channel_absmax: np.ndarray
    channel_square: np.ndarray


def bin_edges() -> np.ndarray:
    """Lower ends of the bins from 2^LOWEST to 2^HIGHEST, and that end; float64."""
    places = np.arange((HIGHEST - LOWEST) * PER_OCTAVE + 1)
    return np.ldexp(1 + places % PER_OCTAVE / PER_OCTAVE, LOWEST + places // PER_OCTAVE)


def observe_rows(x: torch.Tensor, rules: bool = True) -> Observed:
    """Measures a matrix of BF16, float32 or float16; with ``rules`` also what each of ``DYNAMIC_RULES`` costs."""
    check_rows(x)
    seen = _on_cpu(x, rules) if x.device.type == "cpu" else _anywhere(x, rules)
    if not rules:
        seen.sums[MOMENTS:] = np.nan
    return seen


def _empty(columns: int) -> tuple[np.ndarray, ...]:
    """Zeros for all fields of ``Observed`` but the first."""
    largest, square = np.zeros((2, columns), np.float32)
    return np.zeros(BINS, np.int64), np.zeros(len(ZONES), np.int64), np.zeros(SUMS), largest, square


_TARGETS = np.array([rule.target for rule in DYNAMIC_RULES], np.float32)
_POWERS = np.array([rule.power_of_two for rule in DYNAMIC_RULES], np.uint8)
_PER_ROW = np.array([rule.per_row for rule in DYNAMIC_RULES], np.uint8)
_LOWEST = np.array(ZONES, np.float32)


def _on_cpu(x: torch.Tensor, rules: bool) -> Observed:
    source = eager.fit(x.detach())
    # The scale of a whole tensor has to be known to each of its chunks.
    absmax = cpu.absmax_rows(source).numpy().view(np.uint32).max(initial=0)
    patterns = source.view(torch.int16 if source.element_size() == 2 else torch.int32).numpy()
    patterns = patterns.view(WORDS[source.dtype])
    parts: dict[int, Observed] = {}

    def call(first: int, past: int) -> None:
        arrays = _empty(x.shape[1])
        targets = _TARGETS if rules else _TARGETS[:0]
        observe(patterns[first:past], absmax, targets, _POWERS, _PER_ROW, _LOWEST, *arrays)
        parts[first] = Observed(float(absmax.view(np.float32)), *arrays)

    cpu.run_chunks(call, x.shape[0], x.numel(), _CHUNK)
    return _together([parts[first] for first in sorted(parts)])


def _together(parts: list[Observed]) -> Observed:
    summed = ("counts", "zones", "sums", "channel_square")
    found = {name: np.sum([getattr(part, name) for part in parts], axis=0) for name in summed}
    return Observed(parts[0].absmax, **found, channel_absmax=np.max([part.channel_absmax for part in parts], axis=0))


def _anywhere(x: torch.Tensor, rules: bool) -> Observed:
    """In plain torch, some rows at a time."""
    rows = eager.absmax_rows(x)
    absmax = rows.amax()
    at_once = max(1, _AT_ONCE // x.shape[1])
    parts = zip(x.split(at_once), rows.split(at_once), strict=True)
    return _together([_rows_anywhere(part, of_part, absmax, rules) for part, of_part in parts])


def _rows_anywhere(x: torch.Tensor, rows: torch.Tensor, absmax: torch.Tensor, rules: bool) -> Observed:
    """In float32, because some devices have no float64, in units in which no fourth power overflows; summed on the
    CPU. ``rows`` are the largest magnitudes of these rows, ``absmax`` that of the whole matrix."""
    wide = x.float()
    unit = 2.0 ** math.frexp(float(rows.amax()))[1] if rows.amax().isfinite() else 1.0
    scaled = wide / unit
    magnitude = wide.view(torch.int32) & 0x7FFFFFFF
    shift = 23 - PER_OCTAVE.bit_length() + 1
    base, inf = (LOWEST + 127) * PER_OCTAVE, 0x7F800000
    index = ((magnitude >> shift) - base + 1).clamp(0, BINS - 3)
    index = torch.where(magnitude >= inf, BINS - 2 + (magnitude > inf).to(index.dtype), index)
    counts = torch.bincount(index.flatten(), minlength=BINS).cpu().numpy()
    powers = [(scaled.pow(power).sum(1), unit**power) for power in range(1, MOMENTS + 1)]
    zones = np.zeros(len(ZONES), np.int64)
    for place, rule in enumerate(DYNAMIC_RULES if rules else ()):
        scale = eager.absmax_to_scale(rows if rule.per_row else absmax, rule.target, rule.power_of_two)
        by_row = scale[:, None] if rule.per_row else scale
        error = wide - eager.round_float32(wide / by_row, False) * by_row
        powers.append(((error / unit).square().sum(1), unit**2))
        if place == 0:
            at_least = [int((wide.abs() >= low * by_row).sum()) for low in ZONES] + [0]
            zones[:] = np.subtract(at_least[:-1], at_least[1:])
    sums = np.zeros(SUMS)
    sums[: len(powers)] = [float(values.cpu().double().sum()) * factor for values, factor in powers]
    squares = wide.square().sum(0).cpu().numpy()
    return Observed(float(absmax), counts, zones, sums, wide.abs().amax(0).cpu().numpy(), squares)
