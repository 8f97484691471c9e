"""The code tables of HiFloat8, derived from the definition (arXiv 2409.16626, section 3).

A rounded value is a sign, an exponent and at most three mantissa bits, so the upper twelve bits of
its BF16 pattern identify it: encoding is one look-up in 4,096 bytes, decoding one in 256.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

NAN_CODE, INF_CODE = 0x80, 0x6F


def _code_value(code: int) -> float:
    """The value of one code, read field by field. See ``wanquant.formats.reference`` for the prose."""
    if code == NAN_CODE:
        return float("nan")
    sign, body = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if body == INF_CODE:
        return sign * float("inf")
    if body < 8:
        return sign * 2.0 ** (body - 23) if body else 0.0
    if body < 16:
        return sign * (1 + (body & 7) / 8)
    # Width of the exponent field (with its sign bit) and of the mantissa, by the dot code.
    exponent_bits, mantissa_bits = (1, 3) if body < 32 else (2, 3) if body < 64 else (3, 2) if body < 96 else (4, 1)
    field = body >> mantissa_bits & (1 << exponent_bits) - 1
    negative, low = field >> exponent_bits - 1, field & (1 << exponent_bits - 1) - 1
    magnitude = (1 << exponent_bits - 1) | low
    exponent = -magnitude if negative else magnitude
    fraction = (body & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    return sign * 2.0**exponent * (1 + fraction)


CPU = torch.device("cpu")
#: The largest value of E4M3, and the code of its NaN.
LARGEST_E4M3, NAN_E4M3 = 448.0, 0x7F


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
    values = torch.tensor([_code_value(code) for code in range(256)], dtype=torch.float32)
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


@cache
def carry_table(lift: float, device: torch.device = CPU) -> torch.Tensor:
    """int16 [4096]: by the upper twelve bits of a BF16 pattern the code of E4M3 of the value times ``lift``, and 256
    more where that is another value. Beyond 448 it is 448, and of what is not finite NaN."""
    values = (torch.arange(4096, dtype=torch.int32) << 20).view(torch.float32) * lift
    carried = values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    codes, finite = carried.view(torch.uint8).to(torch.int16), values.isfinite()
    lost = ((carried.float() != values) & finite).to(torch.int16) << 8
    return torch.where(finite, codes | lost, NAN_E4M3).to(torch.int16).to(device)


@cache
def round_table(saturate: bool, device: torch.device = CPU) -> torch.Tensor:
    """int64 [256]: rounding by the exponent field of a float32. Its pattern plus the lower half of the entry, and then
    only the bits of the upper half, is the rounded value; 2^16 stands for what overflows to infinity, unless it
    saturates. NaN is not looked after.
    """
    signed, entries = -(2**31), []  # the sign bit, in int32
    for exponent in range(256):
        distance = abs(exponent - 127)
        drop = 20 + (distance > 3) + (distance > 7) + (distance > 15)
        add, keep = 1 << drop - 1, -(1 << drop)
        if exponent < 104:  # zero, which has no sign
            add, keep = 0, 0
        elif exponent == 104:  # up to the smallest value
            add, keep = 1 << 23, signed | 0x7F800000
        elif exponent == 142:  # 32768 up to 40960
            add, keep = 0 if saturate else 3 << 21, signed | 0x7F800000
        elif exponent == 255:
            add, keep = 0, -1
        elif exponent > 142:
            add, keep = (142 if saturate else 255) - exponent << 23, signed | 0x7F800000
        entries.append((keep << 32) | (add & 0xFFFFFFFF))
    return torch.tensor(entries, dtype=torch.int64, device=device)
