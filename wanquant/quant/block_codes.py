"""Products of codes whose blocks have scales: ``product=fp4`` on the FP4 units of a card, of NVFP4 and MXFP4, and
``product=fp8`` of MXFP8.

    y = s_x · s_w · Σ (e_x · t_x) · (e_w · t_w) + b

e are elements, t the scales of their blocks, which the units take beside the codes, s the scales of the tensors (1 of
MX). Sums are float32's, rounded once to BF16. Inputs become codes in plain torch, which is exact and not fast.

Where there are no such units, as on the CPU, the same values are multiplied in BF16, as ``product=fast`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from wanquant.formats.blocks import BlockFormat
from wanquant.kernels import absmax_rows, times
from wanquant.kernels.blocks import block_units, code_blocks, scale_bytes
from wanquant.quant.scale import Direct
from wanquant.quant.scheme import Scheme

E2M1, E4M3, E8M0 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu
#: Compute capability of the first cards with such a product. torch has that of MXFP4 for 10.0 and 10.3 alone.
SINCE, PAST_MX = (10, 0), (11, 0)
#: Features in and out of a linear have to be multiples of it, for FP4.
MULTIPLE = 32
#: Elements of an input that become codes together.
AT_ONCE = 1 << 26


def check_capability(scheme: Scheme, found: tuple[int, int], card: str) -> None:
    mx = scheme.format.name == "mxfp4"
    if found < SINCE or (mx and found >= PAST_MX):
        needed = f"{SINCE[0]}.{SINCE[1]}{' or 10.3' if mx else ' or newer'}"
        raise ValueError(
            f"quant.product=fp4 with {scheme.format.name} needs compute capability {needed}, and {card} has "
            f"{found[0]}.{found[1]}: choose quant.product=fast"
        )


@dataclass(frozen=True)
class BlockCodes:
    """Of a matrix [rows, columns]: codes, uint8 [rows, bytes], of two with four bits the first in the low ones; the
    bytes of the blocks' scales, uint8 [rows, blocks]; the scale of all, float32 []; int64 [], how many elements
    overflowed."""

    codes: torch.Tensor
    blocks: torch.Tensor
    scale: torch.Tensor
    over: torch.Tensor


def encode_input(
    scheme: Scheme, rows: torch.Tensor, scale: torch.Tensor | None, factors: torch.Tensor | None
) -> BlockCodes:
    """Of a matrix [rows, in], by a static ``scale`` or its own: the codes of what ``Scheme.quantize_input`` gives."""
    format_, rule = scheme.act_format, scheme.act_rule
    assert isinstance(format_, BlockFormat)
    if scale is None and isinstance(rule, Direct):
        scale = torch.ones((), device=rows.device)
    elif scale is None:
        scale = rule(scheme.act_granularity.reduce(absmax_rows(times(rows, factors))))  # type: ignore[operator]
    over, parts = torch.zeros((), dtype=torch.int64, device=rows.device), []
    for part in rows.split(max(1, AT_ONCE // rows.shape[1])):
        scaled = times(part, factors) / scale
        over = over + (scaled.abs() >= format_.overflow).sum()
        parts.append(_encode(scaled.reshape(-1, format_.block), format_))
    codes, blocks = (torch.cat(each).view(len(rows), -1) for each in zip(*parts, strict=True))
    return BlockCodes(codes[:, ::2] | codes[:, 1::2] << 4 if format_.bits == 4 else codes, blocks, scale, over)


def _encode(x: torch.Tensor, format_: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and bytes of scales of blocks [count, block] in float32."""
    scale, units = block_units(x, format_.how)
    broken = scale.isnan()
    codes = code_blocks(x.masked_fill(broken, 0.0), units.masked_fill(broken, 0.0), format_.how, format_.bits)
    return codes, scale_bytes(scale, units, format_.how)


def of_packed(codes: torch.Tensor, columns: int, scale: torch.Tensor, bits: int) -> BlockCodes:
    """Of a packed weight."""
    size = columns * bits // 8
    return BlockCodes(codes[:, :size].contiguous(), codes[:, size:], scale, scale.new_zeros(()))


def multiply(x: BlockCodes, weight: BlockCodes, bias: torch.Tensor | None, bits: int) -> torch.Tensor:
    """A card's product, BF16 [rows, out]."""
    (left, how, layout), (right, _, _) = (_operand(each) for each in (x, weight))
    bias, element = None if bias is None else bias.to(torch.bfloat16), E2M1 if bits == 4 else E4M3
    mx = len(how) == 1  # to whose product torch gives no bias
    y = F.scaled_mm(
        x.codes.view(element),
        weight.codes.view(element).T,
        left,
        how,
        right,
        how,
        swizzle_a=layout,
        swizzle_b=layout,
        bias=None if mx else bias,
        output_dtype=torch.bfloat16,
    )
    return y + bias if mx and bias is not None else y


def _operand(x: BlockCodes) -> tuple[list[torch.Tensor], list[F.ScalingType], list[F.SwizzleType]]:
    """The scales of one side, what they are of, and in which order they lie."""
    if x.codes.shape[1] != 8 * x.blocks.shape[1]:  # of NVFP4's 16 elements
        return [in_tiles(x.blocks, E8M0)], [F.ScalingType.BlockWise1x32], [F.SwizzleType.SWIZZLE_32_4_4]
    return (
        [in_tiles(x.blocks, E4M3), x.scale],
        [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise],
        [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE],
    )


def in_tiles(scale: torch.Tensor, dtype: torch.dtype = E8M0) -> torch.Tensor:
    """Bytes of E8M0 or E4M3 [rows, blocks] in the order in which cards of compute capability 10.0 read them: tiles of
    128 by 4, and in a tile row r and block b at 16 · (r mod 32) + 4 · (r div 32) + b; the rest is filled up, with 1 or
    with 0."""
    rows, blocks = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    filled = F.pad(scale, (0, blocks - scale.shape[1], 0, rows - scale.shape[0]), value=127 if dtype == E8M0 else 0)
    tiles = filled.view(rows // 128, 4, 32, blocks // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(dtype)
