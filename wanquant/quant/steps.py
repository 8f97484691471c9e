"""Static scales by denoising step: which of a layer's scales holds in the pass that its transformer is in.

The steps of calibration go into bins of equal length, each with the scale of what passed in it. Where one bin ends is
told by timestep, halfway between its last step and the next bin's first, so that a model runs with any number of steps,
and each of Wan2.2's transformers with those it is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from wanquant.quant.site import Site

#: Stands for a timestep that none reaches: checkpoints hold nothing that is not finite.
BEYOND = 1e30


def takes_timestep(transformer: nn.Module) -> bool:
    return "timestep" in inspect.signature(transformer.forward).parameters


def place_of_timestep(transformer: nn.Module) -> int:
    """Among the arguments of its forward."""
    return list(inspect.signature(transformer.forward).parameters).index("timestep")


def timestep_in(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Of a call, float32 []: the largest of a batch, or of a video's tokens: those of a picture have 0."""
    given: torch.Tensor = kwargs["timestep"] if "timestep" in kwargs else args[place]
    return given.detach().float().amax()


class Timestep:
    """Of the forward pass that a transformer is in, float32 [], where that has it: noted by hooks on the transformer,
    read by its layers."""

    def __init__(self, transformer: nn.Module) -> None:
        self.now: torch.Tensor | None = None
        self._place = place_of_timestep(transformer)
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        transformer.register_forward_hook(self._end, always_call=True)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now = timestep_in(self._place, args, kwargs)

    def _end(self, *_: Any) -> None:
        self.now = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Timestep:
        """A copied layer asks the transformer it is a copy of a part of, and a copied transformer's hooks tell it."""
        return self


def follow_timesteps_(module: nn.Module, layers: Sequence[Any]) -> None:
    """Has the transformer, or both of two as one, tell these layers the timestep of each pass. A part of one, which is
    given none, tells none."""
    for part in getattr(module, "parts", (module,)):
        if not takes_timestep(part):
            continue
        inside = set(part.modules())
        own = [layer for layer in layers if layer in inside]
        hooked = (getattr(hook, "__self__", None) for hook in part._forward_pre_hooks.values())
        told = next((each for each in hooked if isinstance(each, Timestep)), None)
        for layer in own:
            layer.timestep = told = told or Timestep(part)


def scale_now(scales: torch.Tensor, bounds: torch.Tensor, timestep: Timestep | None) -> torch.Tensor:
    """The one, float32 [], of ``scales`` [n] that holds now; ``bounds`` [n - 1] are timesteps, which fall."""
    if timestep is None or timestep.now is None:
        raise RuntimeError("a layer with scales by denoising step runs in its transformer only, which has the timestep")
    return torch.take(scales, (timestep.now.to(bounds.device) < bounds).sum())


def largest_by_bin(seen: Site, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude in each of ``count`` bins of the steps, float32 [count], and the timesteps below which the
    next bin begins, float32 [count - 1]. Bins in which nothing passed (of Wan2.2's transformers each has some) are as
    the nearest one."""
    steps = len(seen.timesteps)
    bins = np.arange(steps) * count // steps
    passed = np.flatnonzero(np.isfinite(seen.timesteps))
    times = seen.timesteps[passed]
    if not len(passed) and seen.absmax.any():
        raise ValueError("scales by denoising step need the timesteps of calibration, and it has noted none")
    if (np.diff(times) > 0).any():
        raise ValueError("scales by denoising step need timesteps that fall, and those of calibration do not")
    by_step = seen.absmax[:, passed].max((0, 2))
    by_bin = {own: by_step[bins[passed] == own].max() for own in sorted(set(bins[passed]))}
    largest = [by_bin[min(by_bin, key=lambda own: abs(own - at))] if by_bin else 0.0 for at in range(count)]
    bounds = []
    for later in range(1, count):
        before, after = times[bins[passed] < later], times[bins[passed] >= later]
        if len(before) and len(after):
            bounds.append((before[-1] + after[0]) / 2)
        else:
            bounds.append(BEYOND if len(after) else -BEYOND)
    return torch.tensor(np.array(largest, np.float32)), torch.tensor(np.array(bounds, np.float32))
