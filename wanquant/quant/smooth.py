"""SmoothQuant (arXiv 2211.10438): what is hard to round in the activations goes, channel by channel, into the weights.

    x W = (x / d) (d W),   d_j = max|x_j|^a / max|W_j|^(1 - a), rounded to a power of two

A power of two changes no product, so without rounding the layer computes what it did. Where the channel comes
straight from a linear or from an affine norm that nothing else reads, the division is folded into its rows or
weights, and costs nothing; elsewhere the layer keeps a factor for each channel, fused into its scale-and-round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wanquant.quant.site import Site


@dataclass(frozen=True)
class Smoothing:
    """Of one linear: the ``divisors`` of its input's channels, float32 [in], powers of two; and whether they are
    ``folded`` into what comes before, so that its input arrives divided and its weight has been multiplied."""

    divisors: torch.Tensor
    folded: bool


def divisors(weight: torch.Tensor, seen: Site, strength: float) -> torch.Tensor:
    """float32 [in], powers of two; 1 for a channel that is all zeros on either side, or not finite. From the weight
    as BF16, so that a source in float32 gives the same; logarithms by the CPU, so that every device does."""
    inputs = torch.from_numpy(seen.view().channel_absmax)
    columns = weight.detach().to(torch.bfloat16).float().abs().amax(0).cpu()
    exponent = (strength * inputs.log2() - (1 - strength) * columns.log2()).round()
    usable = exponent.isfinite() & (exponent.abs() < 100)
    found = torch.ldexp(torch.ones_like(columns), torch.where(usable, exponent, 0.0).to(torch.int32))
    return found.to(weight.device)


@torch.no_grad()
def fold_(writer: nn.Module, divisor: torch.Tensor) -> None:
    """Divides what the module puts out, channel by channel; exact, because the divisors are powers of two."""
    for name, parameter in writer.named_parameters(recurse=False):
        assert name in ("weight", "bias")
        parameter.div_(divisor.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype))


def smooth_(
    module: nn.Module,
    names: Sequence[str],
    blocks: Mapping[str, str],
    stats: Mapping[str, float | Site],
    strength: float,
    folds: Mapping[str, str],
) -> dict[str, Smoothing]:
    """Folds what can be folded, in place, and returns the smoothing of every linear of ``names``.

    ``blocks`` is the block of each linear, by name; ``folds`` has, by name inside a block, the module whose output
    channels a linear reads, if nothing else does. A linear that is not to be quantized itself is not changed, so
    one that is protected stays what it is; then its reader keeps the factors. So it does where a forward hook of either
    adds to an output (a LoRA beside the weights), which is not divided, or reads an input that would be.
    Weights of readers that were folded are multiplied here, those of the others where they are quantized.
    """

    def writer_of(name: str) -> str | None:
        writer = folds.get(name.removeprefix(f"{blocks[name]}."))
        return None if writer is None else f"{blocks[name]}.{writer}"

    done: dict[str, Smoothing] = {}
    # Readers that fold come first: they change weights on which the others' divisors depend.
    for name in sorted(names, key=lambda name: writer_of(name) is None):
        linear, seen, writer_name = module.get_submodule(name), stats[name], writer_of(name)
        assert isinstance(linear, nn.Linear)
        assert isinstance(seen, Site)
        divisor = divisors(linear.weight, seen, strength)
        writer = None if writer_name is None else module.get_submodule(writer_name)
        # A norm without weights has nothing to fold into.
        possible = writer is not None and next(writer.parameters(recurse=False), None) is not None
        alone = not any(each is not None and each._forward_hooks for each in (writer, linear))
        folded = possible and alone and not (isinstance(writer, nn.Linear) and writer_name not in names)
        done[name] = Smoothing(divisor, folded)
        if folded:
            assert writer is not None
            fold_(writer, divisor)
            with torch.no_grad():
                linear.weight.mul_(divisor.to(linear.weight.dtype))
    return done
