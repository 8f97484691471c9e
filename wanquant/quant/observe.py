"""Observers: what passes through a model while it runs, kept as running figures and never as tensors."""

from __future__ import annotations

from collections import defaultdict
from types import TracebackType
from typing import Any

import torch
from torch import nn

from wanquant.kernels import absmax_rows


class ActivationObserver:
    """Records, while entered, for every linear of ``module`` the largest input magnitude and the rows seen,
    and for every block the largest magnitude of the residual stream it puts out.

    Forward hooks only: the computation is not changed. NaN is kept, not skipped.
    """

    def __init__(self, module: nn.Module, blocks: str = "blocks") -> None:
        self.input_absmax: dict[str, float] = {}
        self.rows: dict[str, int] = defaultdict(int)
        self.block_absmax: dict[int, float] = {}
        self._module = module
        self._blocks = blocks
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ActivationObserver:
        for name, child in self._module.named_modules():
            if isinstance(child, nn.Linear):
                self._handles.append(child.register_forward_pre_hook(self._input_hook(name)))
        for index, block in enumerate(self._module.get_submodule(self._blocks).children()):
            self._handles.append(block.register_forward_hook(self._block_hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _input_hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            self.rows[name] += rows.shape[0]
            self.input_absmax[name] = _larger(self.input_absmax.get(name, 0.0), _absmax(rows))

        return hook

    def _block_hook(self, index: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            value = _absmax(output.reshape(-1, output.shape[-1]))
            self.block_absmax[index] = _larger(self.block_absmax.get(index, 0.0), value)

        return hook


def _absmax(rows: torch.Tensor) -> float:
    return float(absmax_rows(rows.detach()).amax())


def _larger(old: float, new: float) -> float:
    """max that keeps NaN, whichever side it comes from."""
    return new if new != new or new > old else old
