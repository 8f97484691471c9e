"""Observers: what passes through a model while it runs, kept as running figures and never as tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from wanquant.kernels import absmax_rows
from wanquant.kernels.statistics import Observed, observe_rows
from wanquant.quant.statistics import INPUT, OUTPUT, RESIDUAL, Layout, Site, Statistics

#: Where a forward pass belongs: index of the video, denoising step, guidance branch.
Place = tuple[int, int, int]


class Observer:
    """Collects ``statistics`` while entered: of every linear's input and output, and of the residual stream behind
    every block; without ``layout.full`` the largest magnitudes of inputs and of the stream only.

    Forward hooks only: the computation is not changed. ``where`` tells to which video, step and branch a pass belongs.
    """

    def __init__(self, module: nn.Module, layout: Layout, where: Callable[[], Place], blocks: str = "blocks") -> None:
        self.statistics = Statistics(layout)
        self._module = module
        self._blocks = blocks
        self._where = where
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._inputs: dict[int, tuple[weakref.ref[torch.Tensor], int, Observed]] = {}

    def __enter__(self) -> Observer:
        for name, child in self._module.named_modules():
            if isinstance(child, nn.Linear):
                self._handles.append(child.register_forward_pre_hook(self._before(f"{name}:{INPUT}")))
                if self.statistics.layout.full:
                    self._handles.append(child.register_forward_hook(self._after(f"{name}:{OUTPUT}")))
        for index, block in enumerate(self._module.get_submodule(self._blocks).children()):
            self._handles.append(block.register_forward_hook(self._after(f"{self._blocks}.{index}:{RESIDUAL}")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, site: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._see(site, inputs[0], is_input=True)

        return hook

    def _after(self, site: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._see(site, output)

        return hook

    def _see(self, name: str, tensor: torch.Tensor, is_input: bool = False) -> None:
        rows = tensor.detach().view(-1, tensor.shape[-1]) if tensor.is_contiguous() else tensor.detach().flatten(0, -2)
        layout, place = self.statistics.layout, self._where()
        site = self.statistics.sites.get(name)
        if site is None:
            site = Site.empty(layout, rows.shape[1], with_square=is_input)
            self.statistics.sites[name] = site
        if not layout.full:
            site.note(place, float(absmax_rows(rows).amax()), len(rows))
            return
        site.add(place, layout.bin_of(place[1]), self._measure(tensor, rows, is_input), len(rows))

    def _measure(self, tensor: torch.Tensor, rows: torch.Tensor, is_input: bool) -> Observed:
        """What is rounded are the inputs, so the rules are tried on them. Several linears share one (Q, K and V; K
        and V of all blocks the text): it is measured once."""
        if not is_input:
            return observe_rows(rows, rules=False)
        known = self._inputs.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        seen = observe_rows(rows)
        self._inputs = {key: value for key, value in self._inputs.items() if value[0]() is not None}
        self._inputs[id(tensor)] = weakref.ref(tensor), tensor._version, seen
        return seen
