"""Scales that need more than the largest magnitude: percentiles, running maxima, and the scale of least error.

Of a weight they are found on the weight itself; of an activation, which has one scale for all then, on what
calibration recorded. The candidates of least-error rules are absmax / (target · 2^(j/4)), j from -16 to 16, or for
``ofmr`` the powers of two from 2^-5 to 2^5 (AMCT's OFMR).

``mse_output`` weighs the error of a weight by the mean square of the channel it multiplies: with rounding errors of
different channels unrelated to each other, that is the error of the layer's output.
"""

from __future__ import annotations

import math

import torch

from wanquant import kernels
from wanquant.formats.base import Format
from wanquant.quant.scale import Ema, Granularity, LeastError, Percentile, PerTensor, Rule
from wanquant.quant.statistics import Site

#: Scales tried in each octave, and how many octaves to either side of the format's own target.
PER_OCTAVE, OCTAVES = 4, 4
#: AMCT's OFMR tries 2^-5 to 2^5.
OFMR = range(-5, 6)


def candidates(absmax: torch.Tensor, rule: LeastError, format_: Format, overflow: str) -> torch.Tensor:
    """Scales to try, float32 [candidates, *absmax.shape]. A target out of range is tried only if overflow saturates."""
    if rule.powers:
        powers = kernels.two_to(torch.tensor(list(OFMR), device=absmax.device))
        return powers.view(-1, *[1] * absmax.ndim).expand(-1, *absmax.shape)
    exponents = range(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE + 1)
    targets = [format_.target * 2 ** (j / PER_OCTAVE) for j in exponents]
    kept = [target for target in targets if overflow == "saturate" or target < format_.overflow]
    return torch.stack([kernels.absmax_to_scale(absmax, target, False) for target in kept])


def weight_scales(
    weight: torch.Tensor,
    granularity: Granularity,
    rule: Percentile | LeastError,
    format_: Format,
    overflow: str,
    mean_square: torch.Tensor | None,
) -> torch.Tensor:
    """Scales of a matrix [out, in], [out] or []. ``mean_square``, [in], is of its input, for errors of the output."""
    whole = isinstance(granularity, PerTensor)
    slices = weight.reshape(1, -1) if whole else weight
    if isinstance(rule, Percentile):
        place = max(1, math.ceil(rule.share * slices.shape[1]))
        magnitudes = slices.float().abs()
        scales = rule.then(magnitudes.kthvalue(place, dim=1).values)
        # An infinity or a NaN may lie above the percentile and must not be overlooked.
        scales = torch.where(magnitudes.amax(1).isfinite(), scales, torch.nan)
    else:
        cost = None if mean_square is None else mean_square.expand(weight.shape).reshape(slices.shape)
        scales = _least_error(slices, cost, rule, format_, overflow)
    return scales[0] if whole else scales


def _least_error(
    slices: torch.Tensor, cost: torch.Tensor | None, rule: LeastError, format_: Format, overflow: str
) -> torch.Tensor:
    """For each row the candidate of least squared error. A row that is not finite gets NaN."""
    absmax, wide = kernels.absmax_rows(slices), slices.float()
    best = torch.full_like(absmax, torch.inf)
    scales = torch.full_like(absmax, torch.nan)
    for scale in candidates(absmax, rule, format_, overflow):
        rounded, _ = format_.scaled_round(slices, scale, overflow)
        error = (rounded.float() * scale[:, None] - wide).square()
        total = (error if cost is None else error * cost).sum(1)
        better = total < best
        best, scales = torch.where(better, total, best), torch.where(better, scale, scales)
    return scales


def static_scale(rule: Rule, seen: float | Site, format_: Format, overflow: str) -> torch.Tensor:
    """The one scale of an activation, float32 []. ``ValueError`` if the rule needs more than a largest magnitude."""
    if isinstance(seen, float | int):
        if isinstance(rule, Percentile | LeastError | Ema):
            raise ValueError(f"the scale rule {rule.name} needs full calibration statistics, not a largest magnitude")
        return rule(torch.tensor(float(seen)))
    if isinstance(rule, Ema):
        return rule.then(torch.tensor(seen.ema()))
    if isinstance(rule, Percentile):
        return rule.then(torch.tensor(seen.view().quantile(rule.share)))
    largest = torch.tensor(seen.largest())
    if not isinstance(rule, LeastError):
        return rule(largest)
    view = seen.view()
    tried = candidates(largest, rule, format_, overflow)
    noise = [view.noise(float(scale), format_, overflow) for scale in tried]
    finite = [value if math.isfinite(value) else math.inf for value in noise]
    if min(finite) == math.inf:  # NaN passed, or nothing is in range
        return torch.tensor(torch.nan if not math.isfinite(float(largest)) else float(tried[-1]))
    return tried[finite.index(min(finite))]
