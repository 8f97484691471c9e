"""HiFloat8 one value at a time, written to be read beside the definition (arXiv 2409.16626, section 3).

The tensor functions are tested against this, and this against the published table of all codes.
"""

from __future__ import annotations

import math

from wanquant.kernels.tables import code_value as decode


def mantissa_bits(exponent: int) -> int:
    """How many mantissa bits a value of 2^exponent has; none in the denormal zone."""
    distance = abs(exponent)
    return 3 if distance <= 3 else 2 if distance <= 7 else 1 if distance <= 15 else 0


def round(x: float, overflow: str = "inf") -> float:
    """To nearest, ties away from zero; +0 for what vanishes."""
    if overflow not in ("inf", "saturate"):
        raise ValueError(f"overflow must be 'inf' or 'saturate', not {overflow!r}")
    if math.isnan(x) or math.isinf(x):
        return math.nan if math.isnan(x) else x
    magnitude = abs(x)
    if magnitude < 2.0**-23:
        return 0.0
    exponent = math.frexp(magnitude)[1] - 1
    unit = 2.0 ** (exponent - mantissa_bits(exponent))
    rounded = max(math.floor(magnitude / unit + 0.5) * unit, 2.0**-22)
    if rounded > 32768.0:
        rounded = math.inf if overflow == "inf" else 32768.0
    return math.copysign(rounded, x)


def encode(x: float, overflow: str = "inf") -> int:
    """The code of the rounded value, found by looking through all of them."""
    value = round(x, overflow)
    if math.isnan(value):
        return 0x80
    return next(code for code in range(256) if decode(code) == value)
