"""Planted outliers: the same function, computed through activations that are hard to round.

Large models have massive activations; a model 128 wide may have none, and then every table of protections says *no
difference*. Here chosen blocks get them, exactly: channels are multiplied by powers of two in one place and divided
by them in the next, which no rounding of BF16 or float32 notices.

    attn1.to_v, attn2.to_v   rows and biases · 2^k     against the columns of the to_out.0 behind them
    norm2                    weights and biases · 2^k  against the columns of attn2.to_q

Attention mixes tokens and not channels, so a factor of V's channel passes through it. Not touched: Q and K, whose
RMS norm runs over all channels; the FFN, where a GELU stands between. What is planted does not reach the residual
stream, so nothing shows there: the outliers are in what enters ``attn1.to_out.0``, ``attn2.to_out.0`` and
``attn2.to_q``.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanquant.quant.select import resolve_blocks
from wanquant.quant.smooth import fold_
from wanquant.wan.config import OutliersConfig
from wanquant.wan.families import folds_of


def chosen_blocks(config: OutliersConfig, blocks: int) -> tuple[int, ...]:
    """Sorted positions; ``ValueError`` names what is out of range."""
    if not 0 <= config.octaves <= 40:
        raise ValueError(f"model.outliers.octaves={config.octaves}: must lie between 0 and 40")
    if config.blocks:
        if config.count:
            raise ValueError("model.outliers takes blocks or a count, not both")
        return resolve_blocks(config.blocks, blocks)
    if not 0 <= config.count <= blocks:
        raise ValueError(f"model.outliers.count={config.count}: the model has {blocks} blocks")
    generator = torch.Generator().manual_seed(config.seed)
    return tuple(sorted(torch.randperm(blocks, generator=generator)[: config.count].tolist()))


@torch.no_grad()
def plant_outliers_(transformer: WanTransformer3DModel, config: OutliersConfig) -> tuple[int, ...]:
    """Changes the chosen blocks in place and returns them. The model computes what it did, bit for bit."""
    chosen = chosen_blocks(config, len(transformer.blocks))
    for index in chosen:
        block = transformer.blocks[index]
        for place, (reader, writer) in enumerate(folds_of(transformer).items()):
            generator = torch.Generator().manual_seed(1000 * config.seed + 10 * index + place)
            linear = block.get_submodule(reader)
            assert isinstance(linear, nn.Linear)
            if next(block.get_submodule(writer).parameters(recurse=False), None) is None:
                raise ValueError(f"model.outliers: {writer} of block {index} has no weights to plant outliers with")
            exponents = config.octaves * torch.randint(2, (linear.in_features,), generator=generator)
            factors = torch.ldexp(torch.ones(len(exponents)), exponents).to(linear.weight.device)
            fold_(block.get_submodule(writer), 1 / factors)
            linear.weight.div_(factors.to(linear.weight.dtype))
    return chosen
