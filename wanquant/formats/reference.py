"""HiFloat8 one value at a time, written to be read beside the definition (arXiv 2409.16626, section 3).

The tensor functions are tested against this, and this against the published table of all codes.
"""

from __future__ import annotations

import math

#: (dot bits of the code, how many they are, exponent bits D, mantissa bits)
DOTS = ((0b11, 2, 4, 1), (0b10, 2, 3, 2), (0b01, 2, 2, 3), (0b001, 3, 1, 3), (0b0001, 4, 0, 3))


def decode(code: int) -> float:
    """The value of a code 0..255: NaN for 0x80, infinities for 0x6F and 0xEF."""
    if code == 0x80:
        return math.nan
    sign, body = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if body == 0x6F:
        return sign * math.inf
    for dot, dot_bits, exponent_bits, mantissa_bits in DOTS:
        if body >> (7 - dot_bits) == dot:
            mantissa = body % 2**mantissa_bits / 2**mantissa_bits
            exponent = _exponent(body >> mantissa_bits, exponent_bits)
            return sign * math.ldexp(1 + mantissa, exponent)
    # Denormal: the dot is 0000 and the three mantissa bits choose the power.
    return sign * math.ldexp(1.0, body - 23) if body else 0.0


def _exponent(field: int, width: int) -> int:
    """Sign-magnitude, sign first; the magnitude's leading one is implicit."""
    if width == 0:
        return 0
    magnitude = (1 << (width - 1)) + field % (1 << (width - 1))
    return -magnitude if field >> (width - 1) & 1 else magnitude


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
