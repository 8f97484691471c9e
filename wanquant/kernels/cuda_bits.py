"""What the Triton kernels of CUDA are made of, on patterns of float32 (int32).

BF16 is read and written as its bits, because a card's cast makes another NaN than torch's on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def round_bits(bits, table, saturate: tl.constexpr):
    """HiF8 rounding of float32 patterns (int32), as ``wanquant.kernels.eager.round_float32``.

    What is added and what is kept depends on the exponent alone, and comes from ``round_table``, which halves
    the instructions of the kernel. The two products leave all values of HiF8 as they are, and make infinity of 2^16,
    which is what rounding gives beyond 32768.
    """
    both = tl.load(table + ((bits >> 23) & 0xFF))
    rounded = ((bits + both.to(tl.int32)) & (both >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    if not saturate:
        rounded = (rounded * 5192296858534827628530496329220096.0) * 1.925929944387235853055977942584927e-34
    value = bits.to(tl.float32, bitcast=True)
    return tl.where(value == value, rounded.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def widen(values, is_bfloat16: tl.constexpr):
    """int16 patterns of BF16, or int32 ones of float32, to int32 ones of float32."""
    if is_bfloat16:
        return values.to(tl.int32) << 16
    else:  # without it both returns are compiled, and their types differ
        return values


@triton.jit
def scale_of(absmax_bits, goal, power_of_two: tl.constexpr):
    """As ``wanquant.kernels.eager.absmax_to_scale``, from the pattern of the absmax."""
    scale = tl.div_rn(absmax_bits.to(tl.float32, bitcast=True), goal)
    if power_of_two:
        bits = scale.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFFF) & 0x7F800000
        # A subnormal's pattern counts units of 2^-149; the power of two above the count is one bit of that pattern.
        count = bits.to(tl.float32).to(tl.int32, bitcast=True)
        above = ((count + 0x7FFFFF) >> 23) - 127
        one = tl.full(bits.shape, 1, tl.int32)
        bits = tl.where(bits < 1 << 23, one << tl.maximum(above, 0), normal)
        scale = tl.where(scale == 0, scale, bits.to(tl.float32, bitcast=True))
    scale = tl.where(scale == 0, 1.0, scale)
    return tl.where(absmax_bits < 0x7F800000, scale, float("nan"))


@triton.jit
def count_lost(lost, missing, among):
    """Adds what this program found to ``lost`` [2], int64; ``among`` is how many all programs look at."""
    tl.atomic_add(lost, missing.to(tl.int64), missing > 0)
    tl.store(lost + 1, among, tl.program_id(0) == 0)


@triton.jit
def factored(bits, factors, at, columns, has_factors: tl.constexpr):
    """float32 of the patterns, each column times its factor."""
    values = bits.to(tl.float32, bitcast=True)
    if has_factors:
        values *= tl.load(factors + at, at < columns, 0)
    return values


@triton.jit
def bfloat16(values):
    """int16 patterns of BF16 of float32, ties to even; of NaN the one of all devices."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def e4m3(values):
    """uint8 codes of E4M3 of float32 up to 448, to nearest, ties to even, and their values.

    Rounded before the cast, of which Triton's interpreter rounds otherwise than a card: beside 2^20 times its power of
    two, at least 2^-6, a number keeps three mantissa bits. What becomes zero keeps its sign, as torch has it.
    """
    bits = values.to(tl.int32, bitcast=True)
    beside = (tl.maximum(bits & 0x7F800000, 121 << 23) + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = tl.where(values < 0, (values - beside) + beside, (values + beside) - beside)
    code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(rounded == 0, ((bits >> 24) & 0x80).to(tl.uint8), code), rounded


@triton.jit
def carried(lifted):
    """uint8 codes of E4M3 of float32, NaN of what is not finite, and where they are other values of finite ones."""
    finite = (lifted.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    code, held = e4m3(tl.minimum(tl.maximum(lifted, -448.0), 448.0))
    return tl.where(finite, code, 0x7F), finite & (held != lifted)


def is16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def pattern(x: torch.Tensor) -> torch.Tensor:
    """The same memory as whole numbers."""
    return x.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])
