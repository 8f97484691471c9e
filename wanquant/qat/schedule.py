"""Learning rates as shares of the highest, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanquant.choices import mistaken
from wanquant.qat.config import SCHEDULES

#: Step to a share of the learning rate, 0 to 1.
Rate = Callable[[int], float]


def make_rate(name: str, steps: int, warmup: int = 0, floor: float = 0.0, begin: int = 0) -> Rate:
    """Rises over ``warmup`` steps, then stays, or falls to ``floor`` in the last of ``steps``.

    The first ``begin`` steps have the whole rate: another phase, after which the schedule starts.
    """
    if name not in SCHEDULES:
        raise mistaken("schedule", name, SCHEDULES)

    def rate(step: int) -> float:
        if step < begin:
            return 1.0
        done = step - begin
        if done < warmup:
            return (done + 1) / warmup
        share = (done - warmup) / max(1, steps - begin - warmup - 1)
        fall = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[name]
        return floor + (1 - floor) * fall

    return rate


class Average:
    """Exponential moving average of parameters: d average + (1 - d) parameter after every step, from ``start`` on.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, start: int = 0) -> None:
        self.parameters, self.decay, self.start, self.steps = list(parameters), decay, start, 0
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step < self.start:
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter)
            return
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages for its parameters while entered."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """The parameters become their averages, for good."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def save(self, path: Path) -> None:
        """Of shards, this process's own."""
        values = {str(place): _local(value) for place, value in enumerate(self.values)}
        save_file(values, path, {"steps": str(self.steps)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.steps = int(file.metadata()["steps"])
            for place, value in enumerate(self.values):
                _local(value).copy_(file.get_tensor(str(place)))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
