"""BF16 products on CPUs that have none.

Where a CPU multiplies no BF16 (anything before AVX-512, most laptops), torch takes a plain loop that is eight times
slower than a float32 product. A float32 product of BF16 operands, rounded once, is what hardware with BF16 products
computes too: exact products, summed in float32. So that is taken instead, by torch's own matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Elements of an input that are in float32 at a time, 64 MB of them.
WIDENED_AT_ONCE = 1 << 24


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has BF16 products, so that torch takes them there."""
    if device.type != "cpu":
        return True
    # A torch without oneDNN (Apple's) has no such product either, and not even the question.
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_linear(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of BF16 tensors without a bias or a gradient, quick on every device."""
    return F.linear(input, weight) if multiplies_bf16(input.device) else wide_linear(input, weight)


def wide_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of BF16 tensors, in float32 and rounded once. For inference: the product is written into place."""
    rows = input.reshape(-1, weight.shape[1])
    wide, offset = weight.float(), None if bias is None else bias.float()
    output = rows.new_empty(len(rows), len(wide))
    at_once = max(1, WIDENED_AT_ONCE // weight.shape[1])
    for part, into in zip(rows.split(at_once), output.split(at_once), strict=True):
        into.copy_(F.linear(part.float(), wide, offset))
    return output.view(*input.shape[:-1], len(wide))
