"""Rotation of what is rounded (QuaRot, arXiv 2404.00456): outliers of single channels spread over many.

    x W = (x R) (Rᵀ W),   R orthogonal: a Hadamard matrix with random signs, for every block of so many channels

Without rounding the layer computes what it did. The input is rotated in every forward, in float32, unless what makes
it can be: where it comes straight from a linear, channels mixed with none but those of their head, as attention's
values do, that linear's outputs are rotated for good (in blocks that fit into a head), and it costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Rotation:
    """Of one linear: whether its input ``arrives`` rotated, in blocks of ``size``, and whether its output ``leaves``
    so, in blocks of ``size_out`` (0: it does not)."""

    size: int
    arrives: bool = False
    size_out: int = 0


def signs(size: int) -> torch.Tensor:
    """float32 [size] of 1 and -1, by a hash, so that they are the same everywhere and always."""
    digest = b"".join(hashlib.sha256(f"{size}:{place}".encode()).digest() for place in range(-(-size // 256)))
    bits = [byte >> place & 1 for byte in digest for place in range(8)]
    return torch.tensor([1.0 - 2.0 * bit for bit in bits[:size]])


def rotation_of(of_signs: torch.Tensor) -> torch.Tensor:
    """R, float32 [size, size], on the signs' device; ``size`` is a power of two."""
    found = of_signs.new_ones(1, 1)
    while len(found) < len(of_signs):
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return torch.mul(of_signs[:, None], found) / math.sqrt(len(of_signs))


def rotate(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Blocks of the last dimension times R, in float32."""
    return torch.flatten(x.float().unflatten(-1, (-1, len(by))) @ by, -2)


def check_size(size: int | None) -> None:
    if size is not None and (size < 2 or size & (size - 1)):
        raise ValueError(f"quant.rotation={size}: must be a power of two, or null for none")


def rotations(
    module: nn.Module, names: Sequence[str], homes: Mapping[str, str], folds: Mapping[str, str], size: int
) -> dict[str, Rotation]:
    """Of every linear of ``names``, whose block is in ``homes``. ``folds`` as for ``wanquant.quant.smooth``.

    Folded is where both are quantized, the output is an attention's heads, and neither has a forward hook, which would
    see or add what is not rotated.
    """
    arriving = dict[str, int]()
    leaving = dict[str, int]()
    for reader, writer in folds.items():
        for name in names:
            if name != f"{homes[name]}.{reader}":
                continue
            maker = f"{homes[name]}.{writer}"
            heads = getattr(module.get_submodule(maker.rpartition(".")[0]), "heads", None)
            pair = [module.get_submodule(each) for each in (name, maker)] if maker in names else []
            if not pair or not heads or any(each._forward_hooks for each in pair):
                continue
            made = pair[1]
            assert isinstance(made, nn.Linear)
            common = math.gcd(size, made.out_features // heads)
            if common > 1:
                arriving[name] = leaving[maker] = common
    return {name: Rotation(arriving.get(name, size), name in arriving, leaving.get(name, 0)) for name in names}


def rotated_rows(
    weight: torch.Tensor, bias: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of a linear whose output is to be rotated, float32."""
    by = rotation_of(signs(size).to(weight.device))
    return rotate(weight.T, by).T, None if bias is None else rotate(bias, by)
