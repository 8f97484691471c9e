"""How much each block, and each kind of linear, costs when it alone is quantized.

Two measures. The cheap one takes a single BF16 pass for all blocks: beside each block a quantized copy of it runs on
the same input, and the SQNR of the copy's output is taken. The expensive one replays BF16's denoising steps once for
each block, with nothing but that block quantized, and takes the SQNR of the model's outputs, which is what counts.
Whether the cheap one ranks blocks as the expensive one does is reported as their rank correlation.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from wanquant.evaluate.fidelity import EQUAL_DB
from wanquant.evaluate.stats import Item
from wanquant.quant import ConversionReport, QuantConfig, plan_conversion, quantize_
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.quant.statistics import Site, first_of
from wanquant.wan.cached import Pair
from wanquant.wan.experts import whole_of
from wanquant.wan.families import folds_of
from wanquant.wan.generate import Position, Sample
from wanquant.wan.load import Pipeline
from wanquant.wan.resources.placement import placement_of

Stats = Mapping[str, float | Site]
#: What calibration found for the linears: statistics of their inputs, and the Hessians of these for error feedback.
Known = tuple[Stats, Mapping[str, torch.Tensor]]
#: ``wanquant.wan.generate.generate`` with all but the pairs and what is asked of them decided.
Make = Callable[..., list[Sample]]


@contextmanager
def quantized(
    transformer: nn.Module,
    quant: QuantConfig | Scheme,
    protected_blocks: Sequence[int],
    protected_modules: Sequence[str] = (),
    stats: Stats | None = None,
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[ConversionReport]:
    """The transformer quantized while entered, and afterwards what it was: quantized are copies of its blocks, whose
    weights are the same tensors unless smoothing would change them."""
    scheme, blocks = scheme_of(quant), transformer.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    plan = plan_conversion(transformer, scheme, protected_blocks, protected_modules)
    changed = sorted({row.block for row in plan.modules if row.status == "converted" and row.block is not None})
    originals = {index: blocks[index] for index in changed}
    try:
        for index, block in originals.items():
            tensors = [] if scheme.smoothing is not None else [*block.parameters(), *block.buffers()]
            blocks[index] = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
        placed = placement_of(transformer)
        how: dict[str, Any] = {"folds": folds_of(transformer), "device": placed.device, "keep": placed.keep_}
        how["hessians"] = hessians
        yield quantize_(transformer, scheme, protected_blocks, protected_modules, stats, **how)
    finally:
        for index, block in originals.items():
            blocks[index] = block


def kinds(transformer: nn.Module, protected: Sequence[str] = ()) -> list[str]:
    """Names of the linears inside a block, of all kinds there are, but for those that match a pattern of
    ``protected``."""
    inside = (block.named_modules() for block in transformer.get_submodule("blocks").children())
    names = dict.fromkeys(name for block in inside for name, child in block if isinstance(child, nn.Linear))
    return [name for name in names if not any(re.fullmatch(pattern, name) for pattern in protected)]


def all_but(transformer: nn.Module, unit: str, modules: Sequence[str] = ()) -> tuple[list[int], list[str]]:
    """Protected blocks and module patterns that leave only ``unit`` to quantize: ``block 3`` or ``kind ffn.net.2``.
    ``modules`` are protected whatever the unit."""
    what, _, name = unit.partition(" ")
    if what == "block":
        count = len(transformer.get_submodule("blocks"))  # type: ignore[arg-type]
        return [index for index in range(count) if index != int(name)], list(modules)
    return [], [re.escape(kind) for kind in kinds(transformer) if kind != name]


@torch.no_grad()
def block_errors(
    pipe: Pipeline,
    scheme: Scheme,
    modules: Sequence[str],
    pairs: Sequence[Pair],
    make: Make,
    known: Known,
    on_step: Callable[[], None],
    together: int = 1,
) -> list[list[Item]]:
    """SQNR in dB of each block's own output when it alone is quantized but for ``modules``, by block and pair, in one
    BF16 pass; at most ``EQUAL_DB``. A pass computes so many guidance branches ``together``."""
    transformer = whole_of(pipe)
    blocks, placed = list(transformer.blocks), placement_of(transformer)
    with quantized(transformer, replace(scheme, packed=True), (), modules, *known):
        copies = list(transformer.blocks)
    signal = torch.zeros(len(blocks), len(pairs), dtype=torch.float64)
    noise = torch.zeros_like(signal)
    position = Position()

    def beside(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            exact = first_of(output).float()
            error = first_of(placed.there(copies[index])(*args, **kwargs)).float() - exact
            for total, tensor in ((signal, exact), (noise, error)):
                rows = tensor.flatten(1).square().sum(1).cpu().double()
                videos = rows.view(together, -1).sum(0)  # a row of each branch that is computed in this pass
                total[index, position.video : position.video + len(videos)] += videos

        return hook

    handles = [block.register_forward_hook(beside(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        make(pairs, on_step, decode=False, position=position)
    finally:
        for handle in handles:
            handle.remove()
    decibels = 10 * torch.log10(signal / noise)
    decibels = torch.where((noise == 0) & signal.isfinite(), EQUAL_DB, decibels.clamp(max=EQUAL_DB))
    return [[Item(*pair, value) for pair, value in zip(pairs, row, strict=True)] for row in decibels.tolist()]
