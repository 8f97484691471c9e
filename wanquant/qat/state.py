"""What a training keeps from step to step: the moving average of its weights, and its states on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

#: In each state: how far it is, and what the loop reported until then.
LOOP_FILE = "loop.json"


class Average:
    """Exponential moving average of parameters: d average + (1 - d) parameter after every step, from ``start`` on.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, start: int = 0) -> None:
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
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - keep)

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


def sharding() -> bool:
    """Whether accelerate is configured to shard what is trained."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpu_(accelerator: Accelerator) -> Accelerator:
    """accelerate shards on cards alone and says nothing; torch's ``fully_shard``, which it calls, knows CPUs too."""
    if sharding() and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def gather_(module: nn.Module) -> None:
    """Makes whole tensors of shards."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            whole: Any = getattr(parameter, "full_tensor", None)
            if parameter is not None and whole is not None:
                child._parameters[name] = nn.Parameter(whole().detach(), parameter.requires_grad)


@contextmanager
def new_state(accelerator: Accelerator, folder: Path, done: int) -> Iterator[Path]:
    """A folder for each process to write its part of the state after ``done`` steps to; when all have, it gets its
    name, and earlier states go."""
    final = folder / f"state-{done:06d}"
    partial = final.with_name(f"{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for other, path in states_in(folder):
            if other != done:
                shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def states_in(folder: Path) -> list[tuple[int, Path]]:
    """Steps done and place of the whole states in a loop's folder, the last one last."""
    found = (re.fullmatch(r"state-(\d+)", path.name) for path in folder.glob("state-*"))
    return sorted((int(match[1]), folder / match[0]) for match in found if match)


def last_state(folder: Path, recipe: str, main: bool) -> tuple[Path, dict[str, Any]] | None:
    """The last whole state in a loop's folder and its ``LOOP_FILE``; the ``main`` process clears away what is not
    whole. ``ValueError`` if it was made by another recipe."""
    for partial in folder.glob("state-*.partial") if main else ():
        shutil.rmtree(partial, ignore_errors=True)
    states = states_in(folder)
    if not states:
        return None
    found = states[-1][1]
    state = json.loads((found / LOOP_FILE).read_text(encoding="utf-8"))
    if state["recipe"] != recipe:
        raise ValueError(f"{found} was made by another recipe: {state['recipe']}, not {recipe}")
    return found, state


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights in the last state of a loop's folder; of tied ones there is one. ``ValueError`` if there is
    no state."""
    states = states_in(folder)
    if not states:
        raise ValueError(f"{folder} holds no state of a training")
    return load_file(states[-1][1] / "model.safetensors")
