"""What of a linear is rounded: its weight, changed as smoothing, a low-rank branch and rotation ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from wanquant.quant.low_rank import low_rank
from wanquant.quant.rotate import Rotation, rotate, rotated_rows, rotation_of, signs
from wanquant.quant.smooth import Smoothing


@dataclass
class Source:
    """``weight`` [out, in], BF16, or float32 where it is no longer that; ``divisors`` of the input's channels; and what
    the quantized linear keeps ``beside`` its weight, by name."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    divisors: torch.Tensor | None = None
    beside: dict[str, torch.Tensor] = field(default_factory=dict)


def source_of(linear: nn.Linear, rank: int, smoothing: Smoothing | None, rotation: Rotation | None) -> Source:
    """From BF16: a source in float32 is cast first, so both give the same."""
    found = Source(linear.weight.detach().to(torch.bfloat16), linear.bias)
    if smoothing is not None:
        found.divisors = smoothing.divisors.to(found.weight.device)
        if not smoothing.folded:
            found.weight = found.weight * found.divisors.to(torch.bfloat16)
            found.beside["input_factor"] = 1 / found.divisors
    if rotation is not None and rotation.size_out:
        found.weight, found.bias = rotated_rows(found.weight, found.bias, rotation.size_out)
    if rotation is not None and rotation.arrives:
        found.weight = rotate(found.weight, rotation_of(signs(rotation.size).to(found.weight.device)))
    if rank:
        up, down = low_rank(found.weight.float(), rank)
        found.weight = found.weight.float() - up.float() @ down.float()
        # The branch takes the input before its channels are multiplied.
        factor = found.beside.get("input_factor")
        found.beside |= {"low_rank_up": up, "low_rank_down": down if factor is None else down * factor.to(down.dtype)}
    if rotation is not None and not rotation.arrives:
        found.beside["input_signs"] = signs(rotation.size).to(found.weight.device)
        found.weight = rotate(found.weight, rotation_of(found.beside["input_signs"]))
    return found
