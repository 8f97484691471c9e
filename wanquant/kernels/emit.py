"""HiF8 rounding and encoding as LLVM instructions, and the other steps on bit patterns that numba has no words for.

numba widens every integer to 64 bits. These functions work in the pattern's own width: on 16-bit lanes a vector holds
four times as many BF16 values.

numba keeps the compiled loops by the date of their own file; those that are older than this one are thrown away here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from wanquant.kernels import tables
from wanquant.kernels.tables import INF_CODE, NAN_CODE


def _forget_older_loops() -> None:
    sources = (Path(__file__), Path(tables.__file__))
    changed = max(source.stat().st_mtime for source in sources)
    for index in Path(__file__).parent.glob("__pycache__/*.nbi"):
        with suppress(OSError):  # another process may be at it too
            if index.stat().st_mtime < changed:
                index.unlink()


_forget_older_loops()

WORD16, WORD32 = ir.IntType(16), ir.IntType(32)


def _emitted(result: types.Type | None = None) -> Callable[[Callable[..., ir.Value]], Any]:
    """Makes a function for use within numba's loops of one that emits its instructions, ``emit(builder, *values)``.
    ``result`` is its type, that of the first argument if None."""

    def made(emit: Callable[..., ir.Value]) -> Any:
        @wraps(emit)  # numba reads the names of the arguments, of which the builder stands for the context
        def typed(context: Any, *arguments: Any) -> Any:
            def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
                return emit(builder, *values)

            return (result or arguments[0])(*arguments), generate

        return intrinsic(typed)

    return made


def _constants(word: ir.IntType) -> tuple[Callable[[int], ir.Constant], Callable[[int], ir.Constant], int]:
    """Of BF16 (i16) or float32 (i32): an integer of that width; the pattern of 2^exponent; bits of the mantissa."""
    mantissa = 7 if word.width == 16 else 23

    def constant(value: int) -> ir.Constant:
        return ir.Constant(word, value % (1 << word.width))

    def power(exponent: int) -> ir.Constant:
        return constant((exponent + 127) << mantissa)

    return constant, power, mantissa


def _emit_round(builder: ir.IRBuilder, bits: ir.Value, noise: ir.Value | None, saturate: ir.Value) -> ir.Value:
    """HiF8 rounding of one BF16 (i16) or float32 (i32) pattern.

    Add half a unit of the last place kept (or ``noise``, uniform bits, shifted to be below one unit), cut the
    rest. The carry into the exponent is right, because the power of two it reaches is in every zone.
    """
    constant, power, mantissa = _constants(bits.type)
    inf, less, equal = power(128), partial(builder.icmp_unsigned, "<"), partial(builder.icmp_unsigned, "==")
    sign = builder.and_(bits, constant(1 << (bits.type.width - 1)))
    magnitude = builder.xor(bits, sign)
    # How many bits go: all but 3 for exponents within ±3, all but 2 within ±7, all but 1 within ±15.
    drop = constant(mantissa)
    for bound, kept in ((15, 1), (7, 2), (3, 3)):
        inside = less(builder.sub(magnitude, power(-bound)), constant((2 * bound + 1) << mantissa))
        drop = builder.select(inside, constant(mantissa - kept), drop)
    unit = builder.shl(constant(1), drop)
    if noise is None:
        below_unit = builder.lshr(unit, constant(1))
    else:
        below_unit = builder.and_(noise, builder.sub(unit, constant(1)))
    rounded = builder.and_(builder.add(magnitude, below_unit), builder.neg(unit))
    if noise is None:
        rounded = builder.select(less(rounded, power(-22)), power(-22), rounded)
        rounded = builder.select(less(magnitude, power(-23)), constant(0), rounded)
    rounded = builder.select(less(power(15), rounded), builder.select(saturate, power(15), inf), rounded)
    rounded = builder.select(equal(magnitude, inf), inf, rounded)
    signed = builder.select(equal(rounded, constant(0)), rounded, builder.or_(rounded, sign))
    quiet = constant((0xFF << mantissa) | 1 << (mantissa - 1))
    return builder.select(less(inf, magnitude), quiet, signed)


@_emitted()
def round_bits(builder: ir.IRBuilder, bits: ir.Value, saturate: ir.Value) -> ir.Value:
    """The rounded pattern of a uint16 or uint32 one, of the same type."""
    return _emit_round(builder, bits, None, saturate)


@_emitted()
def round_bits_by(builder: ir.IRBuilder, bits: ir.Value, noise: ir.Value, saturate: ir.Value) -> ir.Value:
    """Stochastic rounding of a uint32 pattern of at least 2^-22 in magnitude, by 32 random bits."""
    return _emit_round(builder, bits, noise, saturate)


@_emitted(types.uint8)
def encode_bits(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The code of a rounded pattern, uint16 or uint32; a look-up in a table would be one load after the other.

    Within a zone of k mantissa bits and one sign of the exponent, codes are consecutive: they rise with the
    pattern where exponents are positive, and where they are negative exponents fall while mantissas still rise.
    """
    constant, power, _ = _constants(WORD16)
    less, equal = partial(builder.icmp_unsigned, "<"), partial(builder.icmp_unsigned, "==")
    if bits.type.width == 32:
        bits = builder.trunc(builder.lshr(bits, ir.Constant(WORD32, 16)), WORD16)
    magnitude = builder.and_(bits, constant(0x7FFF))
    negative = less(magnitude, power(0))
    # Powers of two below 2^-15: codes 1 to 7, and 0 for zero, whose exponent is below all of them.
    steps = builder.lshr(magnitude, constant(7))
    code = builder.sub(builder.select(less(steps, constant(104)), constant(104), steps), constant(104))
    # Smallest |exponent|, bits of the exponent field (its sign's among them), of the mantissa, and first code.
    for low, field, kept, first in ((8, 4, 1, 96), (4, 3, 2, 64), (2, 2, 3, 32), (1, 1, 3, 16), (0, 0, 3, 8)):
        high = 2 * low - 1 if low else 0
        inside = less(builder.sub(magnitude, power(-high)), constant((2 * high + 1) << 7))
        steps = builder.lshr(magnitude, constant(7 - kept))  # exponent and the mantissa bits kept
        rising = builder.add(steps, constant(first - ((127 + low) << kept)))
        if low:
            mantissa = builder.and_(steps, constant((1 << kept) - 1))
            falling = builder.sub(builder.shl(mantissa, constant(1)), steps)
            offset = first + (1 << (field - 1 + kept)) + ((127 - low) << kept)
            rising = builder.select(negative, builder.add(falling, constant(offset)), rising)
        code = builder.select(inside, rising, code)
    code = builder.select(equal(magnitude, power(128)), constant(INF_CODE), code)
    sign = builder.lshr(builder.and_(bits, constant(0x8000)), constant(8))
    code = builder.select(equal(magnitude, constant(0)), constant(0), builder.or_(code, sign))
    code = builder.select(less(power(128), magnitude), constant(NAN_CODE), code)
    return builder.trunc(code, ir.IntType(8))


@_emitted()
def magnitude_of(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The pattern without its sign, of the same type."""
    return builder.and_(bits, ir.Constant(bits.type, (1 << (bits.type.width - 1)) - 1))


@_emitted(types.uint32)
def widen(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The float32 pattern of a BF16 (uint16) or float32 one."""
    return builder.shl(builder.zext(bits, WORD32), ir.Constant(WORD32, 16)) if bits.type.width == 16 else bits


@_emitted(types.float32)
def to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The float32 of a uint32 pattern."""
    return builder.bitcast(bits, ir.FloatType())


@_emitted(types.uint32)
def to_bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The uint32 pattern of a float32."""
    return builder.bitcast(value, WORD32)


@_emitted(types.voidptr)
def pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())
