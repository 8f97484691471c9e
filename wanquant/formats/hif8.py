"""HiFloat8 on tensors: round, encode, decode (arXiv 2409.16626).

One byte of sign, dot, exponent and mantissa, whose prefix code trades exponent against mantissa:
three mantissa bits for 2^-3 to 2^3, two up to 2^±7, one up to 2^±15, and pure powers of two from
2^-22 to 2^-16. Rounding is to nearest, ties away from zero in magnitude.

Special values: one zero (-0 and all below 2^-23 in magnitude become +0), one NaN (0x80; every NaN
becomes the canonical quiet one), infinities 0x6F and 0xEF. Magnitudes of 40960 and more overflow:
to infinity with ``overflow="inf"``, to ±32768 with ``overflow="saturate"``, where a true infinity
stays one. ``round(x)`` equals ``decode(encode(x))`` bit for bit.

The scalar definition is ``wanquant.formats.reference``; the kernels are in ``wanquant.kernels``.
"""

from __future__ import annotations

import torch

from wanquant.kernels.dispatch import FLOATS, OPS, check_float, saturates


def round(x: torch.Tensor, overflow: str = "inf", out: torch.Tensor | None = None) -> torch.Tensor:
    """Nearest HiF8 value of each element, in the shape and dtype of ``x``.

    Takes float32, bfloat16 or float16 of any shape and layout, on any device; every HiF8 value is
    exact in all three. Free of autograd. ``out`` may be ``x`` itself. ``TypeError`` for another dtype.
    """
    check_float(x)
    saturate = saturates(overflow)
    if out is None:
        values: torch.Tensor = OPS.round_hif8.default(x, saturate)
        return values
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype} on {x.device}")
    # Addresses are known only where something is computed.
    if out is not x and not torch.compiler.is_compiling() and not x.is_meta and _overlap(x, out):
        raise ValueError("out overlaps x: it may be x itself, or must lie elsewhere")
    OPS.round_hif8_out.default(x, saturate, out)
    return out


def _overlap(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether writing one element of ``out`` may change another of ``x``. False for two views of the same elements."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() or not x.numel():
        return False
    if x.data_ptr() == out.data_ptr() and x.stride() == out.stride():
        return False
    last_x, last_out = (sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in (x, out))
    first_x, first_out = x.storage_offset(), out.storage_offset()
    return bool(first_x <= first_out + last_out and first_out <= first_x + last_x)


def round_stochastic(x: torch.Tensor, generator: torch.Generator | None = None, overflow: str = "inf") -> torch.Tensor:
    """One of the two HiF8 neighbours of each element, the nearer the likelier, so that the expectation is ``x``.

    For gradients, whose small steps rounding to nearest would lose. The random bits come from ``generator``, never
    from the input's own low bits; the same seed gives the same result, with a CPU generator on every device. The
    probability is exact, to 2^-24 between 0 and 2^-22. Beyond 32768 there is no upper neighbour to balance: the
    choice is between 32768 and what ``overflow`` says, as if that were 49152.
    """
    check_float(x)
    saturate = saturates(overflow)
    device = x.device if generator is None else generator.device
    noise = torch.randint(-(2**31), 2**31, x.shape, generator=generator, device=device, dtype=torch.int32)
    values: torch.Tensor = OPS.round_hif8_stochastic.default(x, noise.to(x.device), saturate)
    return values


def encode(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    """The uint8 code of each element, rounded first, in the shape of ``x``."""
    check_float(x)
    codes: torch.Tensor = OPS.encode_hif8.default(x, saturates(overflow))
    return codes


def decode(codes: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The values of uint8 ``codes``, in their shape."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"HiF8 codes are uint8, not {codes.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"HiF8 decodes to float32, bfloat16 or float16, not {dtype}")
    values: torch.Tensor = OPS.decode_hif8.default(codes, dtype)
    return values
