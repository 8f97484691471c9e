"""Formats with blocks one block at a time, written to be read beside the definitions; the tensor functions are tested
against this. Numbers are float32 (NumPy's), as where a kernel computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Magnitudes of E2M1 and S1P2, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
S1P2 = tuple(quarter / 4 for quarter in range(8))
Block = Sequence[float]


def nearest(value: float, mantissa: int, least: int, largest: float) -> float:
    """Of a float of so many mantissa bits, whose normal values begin at 2^least: ties to even, at most ``largest``."""
    if value >= largest:
        return largest
    exponent = max(math.frexp(value)[1] - 1, least) if value else least
    step = math.ldexp(1.0, exponent - mantissa)
    return round(value / step) * step


def bf16(value: float) -> float:
    """To BF16, ties to even; of normal values."""
    return nearest(float(value), 7, -126, math.inf)


def _broken(block: Block) -> bool:
    return not all(math.isfinite(value) for value in block)


def _signed(magnitudes: Sequence[float], block: Block) -> list[float]:
    return [math.copysign(magnitude, value) for magnitude, value in zip(magnitudes, block, strict=True)]


def nvfp4(block: Block) -> list[float]:
    """16 values: E2M1 times an E4M3."""
    if _broken(block):
        return [math.nan] * len(block)
    largest = max(abs(value) for value in block)
    scale = nearest(float(np.float32(largest) / np.float32(6)), 3, -6, 448.0)
    if scale == 0:
        return _signed([0.0] * len(block), block)
    quotients = [float(np.float32(abs(value)) / np.float32(scale)) for value in block]
    return _signed([nearest(quotient, 1, 0, 6.0) * scale for quotient in quotients], block)


def mx(block: Block, mantissa: int, least: int, top: float) -> list[float]:
    """32 values: floats of a few bits, at most ``top``, times a power of two."""
    if _broken(block):
        return [math.nan] * len(block)
    largest = max(abs(value) for value in block)
    exponent = math.frexp(largest)[1] - math.frexp(top)[1]
    scale = math.ldexp(1.0, min(max(exponent, -127), 127))
    return _signed([nearest(abs(value) / scale, mantissa, least, top) * scale for value in block], block)


def int4(block: Block) -> list[float]:
    """64 or 128 whole numbers from -7 to 7 times a BF16, and the product in BF16."""
    if _broken(block):
        return [math.nan] * len(block)
    scale = bf16(float(np.float32(max(abs(value) for value in block)) / np.float32(7)))
    if scale == 0:
        return [0.0] * len(block)
    quotients = [float(np.float32(abs(value)) / np.float32(scale)) for value in block]
    return [value + 0.0 for value in _signed([bf16(nearest(q, 2, 2, 7.0) * scale) for q in quotients], block)]


def hif4(block: Block) -> list[float]:
    """64 values (arXiv 2602.11287, algorithm 1): S1P2 times E6M2, doubled for some eights and for some fours."""
    if _broken(block):
        return [math.nan] * len(block)
    magnitudes = [np.float32(abs(value)) for value in block]
    seventh = bf16(float(max(magnitudes) * np.float32(bf16(1 / 7))))
    level = nearest(max(seventh, 2.0**-48), 2, -48, 49152.0)
    reciprocal = np.float32(bf16(1 / level))
    found: list[float] = []
    for eight in range(0, 64, 8):
        second = int(max(magnitudes[eight : eight + 8]) * reciprocal >= 4)
        for four in (eight, eight + 4):
            third = int(max(magnitudes[four : four + 4]) * reciprocal * np.float32(0.5) ** second >= 2)
            power = np.float32(2 ** (second + third))
            for magnitude in magnitudes[four : four + 4]:
                quarters = magnitude * (reciprocal / power) * np.float32(4) + np.float32(0.5)
                found.append(min(math.floor(quarters), 7) / 4 * level * float(power))
    return _signed(found, block)
