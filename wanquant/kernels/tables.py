"""The code tables of HiFloat8, derived from the definition (arXiv 2409.16626, section 3).

A rounded value is a sign, an exponent and at most three mantissa bits, so the upper twelve bits of
its BF16 pattern identify it: encoding is one look-up in 4,096 bytes, decoding one in 256.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

NAN_CODE, INF_CODE = 0x80, 0x6F


#: (dot bits of the code, how many they are, exponent bits D, mantissa bits)
DOTS = ((0b11, 2, 4, 1), (0b10, 2, 3, 2), (0b01, 2, 2, 3), (0b001, 3, 1, 3), (0b0001, 4, 0, 3))


def code_value(code: int) -> float:
    """The value of a code 0..255: NaN for 0x80, infinities for 0x6F and 0xEF."""
    if code == NAN_CODE:
        return math.nan
    sign, body = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if body == INF_CODE:
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


CPU = torch.device("cpu")


#: The NaN of float16 that every device gives.
NAN16 = 0x7E00


def narrow(rounded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Exact float32 values in another type, NaN with the same bits on every device.

    BF16 by its bits, for torch's own cast has two kinds of NaN. Of float16 the CPU makes 0x7E00 where a card makes
    0x7FFF, so it is put there.
    """
    if dtype == torch.float32:
        return rounded
    if dtype == torch.bfloat16:
        return (rounded.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(rounded.isnan(), NAN16, rounded.to(torch.float16).view(torch.int16)).view(torch.float16)


@cache
def decode_table(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> torch.Tensor:
    """[256]: the value of every code, exact in float32, BF16 and FP16."""
    values = torch.tensor([code_value(code) for code in range(256)], dtype=torch.float32)
    return narrow(values, dtype).to(device)


@cache
def encode_table(device: torch.device = CPU) -> torch.Tensor:
    """uint8 [4096]: the code of every rounded value, by the upper twelve bits of its BF16 pattern.

    -0 has the code of zero; patterns that are no HiF8 value, all NaN among them, have that of NaN.
    """
    table = np.full(4096, NAN_CODE, dtype=np.uint8)
    values = decode_table().to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    for code in range(256):
        if code != NAN_CODE:
            table[values[code] >> 4] = code
    table[0x8000 >> 4] = 0
    return torch.from_numpy(table).to(device)
