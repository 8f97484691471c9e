"""The eager kernels: plain torch on integers, for any device. Exact, not fast."""

from __future__ import annotations

import torch

from wanquant.kernels.tables import decode_table, encode_table

_MAGNITUDE = 0x7FFFFFFF
_INF = 0x7F800000
_NAN = 0x7FC00000
_MAX = 142 << 23  # 2^15 = 32768, the largest finite value
_TINY = 104 << 23  # 2^-23: below it, zero
_SMALLEST = 105 << 23  # 2^-22, the smallest positive value


def round_float32(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    """Rounds float32 to HiF8, ties away from zero: add half a unit of the magnitude's bits, cut the rest.

    The carry into the exponent is right everywhere, because the value it reaches, a power of two,
    is in every zone of the format.
    """
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    distance = ((magnitude >> 23) - 127).abs()
    # 3 mantissa bits kept up to |E| = 3, 2 up to 7, 1 up to 15, none in the denormal zone.
    drop = 20 + (distance > 3).int() + (distance > 7).int() + (distance > 15).int()
    rounded = ((magnitude + (1 << (drop - 1))) >> drop) << drop
    rounded = torch.where(magnitude < _TINY, 0, rounded.clamp_min(_SMALLEST))
    over = (rounded > _MAX) & (magnitude != _INF) if saturate else rounded > _MAX
    rounded = torch.where(over, _MAX if saturate else _INF, rounded)
    signed = torch.where(rounded == 0, 0, rounded | (bits & ~_MAGNITUDE))
    return torch.where(magnitude > _INF, _NAN, signed).view(torch.float32)


def narrow(rounded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Exact float32 values in a 16-bit type. BF16 by its bits: torch's own cast has two kinds of NaN."""
    if dtype != torch.bfloat16:
        return rounded.to(dtype)
    return (rounded.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def round_any(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    return narrow(round_float32(x.to(torch.float32).contiguous(), saturate), x.dtype)


def encode(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    rounded = round_float32(x.to(torch.float32).contiguous(), saturate)
    index = (rounded.view(torch.int32) >> 20) & 0xFFF
    # The upper twelve bits of a float32 are those of its BF16.
    return encode_table().to(x.device)[index.long()]


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return narrow(decode_table(), dtype).to(codes.device)[codes.long()]


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=1).float()


def scaled_round(x: torch.Tensor, scale: torch.Tensor, saturate: bool) -> torch.Tensor:
    scaled = x.float() / (scale[:, None] if scale.ndim else scale)
    return narrow(round_float32(scaled, saturate), torch.bfloat16)
