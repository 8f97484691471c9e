"""The product of rounded operands, with its scales: in BF16, or exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wanquant.kernels import descale
from wanquant.quant.scheme import Scheme

#: BF16 values on the grid, and their scales in float32.
Scaled = tuple[torch.Tensor, torch.Tensor]
#: Weights that ``product=exact`` keeps in float32 at a time, 8 MB of them.
WIDENED_AT_ONCE = 1 << 21


def take_product(
    x: Scaled, weight: Scaled, bias: torch.Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor:
    """[rows, out] of BF16 values [rows, in] and [out, in], the scales applied after it."""
    product = _exact_product(x[0], weight[0]) if scheme.product == "exact" else F.linear(x[0], weight[0])
    return descale(product, x[1], weight[1], bias, dtype)


def _exact_product(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [rows, out] of BF16 values [rows, in] and [out, in]. A card multiplies BF16 exactly and sums in float32.
    Elsewhere large weights are widened some rows at a time into the same memory, because a fresh
    float32 copy of all of them costs a seventh of the product."""
    if operand.is_cuda:
        return torch.mm(operand.detach(), weight.detach().T, out_dtype=torch.float32)
    wide, weight, rows = operand.detach().float(), weight.detach(), max(1, WIDENED_AT_ONCE // weight.shape[1])
    if len(weight) <= rows or torch.compiler.is_compiling():  # the compiler refuses to write into columns
        return F.linear(wide, weight.float())
    product, part = wide.new_empty(len(wide), len(weight)), wide.new_empty(rows, weight.shape[1])
    for first in range(0, len(weight), rows):
        past = min(first + rows, len(weight))
        torch.mm(wide, part[: past - first].copy_(weight[first:past]).T, out=product[:, first:past])
    return product
