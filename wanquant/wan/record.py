"""Inputs and outputs of a Wan transformer while it denoised: the data of distillation, which need no videos.

A recorded step is a noisy latent with its timestep and prompt; a guided model runs twice in a denoising step, with
the prompt and without. Kept batch by batch, as they are made; read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.experts import transformers_in
from wanquant.wan.products import quick_products

#: Recorded steps run together at most (one where videos are made one at a time: they would share their scales), and
#: what equal outputs count, as everywhere.
AT_ONCE, EQUAL_DB = 40, 100.0
KIND, FILE = "trajectories", "trajectories.safetensors"


@dataclass(frozen=True)
class RecordedStep:
    """``noisy`` and ``output`` as the model took and gave them, [channels, frames', h, w]."""

    noisy: torch.Tensor
    timestep: torch.Tensor
    prompt: str
    output: torch.Tensor


class Recording:
    """All recorded steps of these pairs: ``len(recording)`` of them, pair by pair, step by step, branch by branch."""

    def __init__(self, pipeline: CachedPipeline, pairs: Sequence[Pair], label: str = "record BF16") -> None:
        """From the cache, or made now, with the model in BF16."""
        self.negative = pipeline.model.generation.negative_prompt
        self.steps = pipeline.model.generation.steps
        self.branches = pipeline.model.generation.branches
        self._place: list[tuple[Pair, Path, int]] = []
        batch = pipeline.model.batch
        groups = [list(pairs[first : first + batch]) for first in range(0, len(pairs), batch)]
        signatures = [pipeline.signature(KIND, pairs=group) for group in groups]
        missing = [
            p
            for group, each in zip(groups, signatures, strict=True)
            if not pipeline.cache.has(KIND, each)
            for p in group
        ]
        with pipeline.progress(label, missing) as tick:
            for group, each in zip(groups, signatures, strict=True):
                folder = pipeline.cache.folder(KIND, each, _recorder(pipeline, group, tick))
                self._place += [(pair, folder / FILE, row) for row, pair in enumerate(group)]

    def __len__(self) -> int:
        return len(self._place) * self.steps * self.branches

    def __getitem__(self, place: int) -> RecordedStep:
        (prompt, path, row), step, branch = self._find(place)
        with safe_open(path, "pt") as file:
            noisy, output = (file.get_slice(name)[step, branch, row] for name in ("noisy", "output"))
            timestep = file.get_slice("timestep")[step, branch, row]
        return RecordedStep(noisy, timestep, prompt if branch == 0 else self.negative, output)

    def timestep(self, place: int) -> float:
        (_, path, row), step, branch = self._find(place)
        with safe_open(path, "pt") as file:
            return float(file.get_slice("timestep")[step, branch, row])

    def _find(self, place: int) -> tuple[tuple[str, Path, int], int, int]:
        """Its prompt, file and row there; its step and branch."""
        asked, branch = divmod(place, self.branches)
        pair_place, step = divmod(asked, self.steps)
        (prompt, _), path, row = self._place[pair_place]
        return (prompt, path, row), step, branch


@torch.no_grad()
def step_errors(pipeline: CachedPipeline, recording: Recording, on_video: Callable[[], None]) -> list[float]:
    """For each pair the SQNR in dB of the transformer's outputs, as it is now, over its recorded steps: the error of
    single steps, before the sampler has added them up. ``on_video`` is called for each pair."""
    transformer, found = pipeline.transformer, []
    each, device, at_once = recording.steps * recording.branches, pipeline.device, min(AT_ONCE, pipeline.model.batch)
    for first in range(0, len(recording), each):
        signal = noise = 0.0
        for start in range(first, first + each, at_once):
            asked = [recording[place] for place in range(start, min(start + at_once, first + each))]
            noisy, timestep, wanted = (
                torch.stack([getattr(each, name) for each in asked]).to(device)
                for name in ("noisy", "timestep", "output")
            )
            text = torch.stack([pipeline.embed(each.prompt) for each in asked]).to(device)
            with quick_products(device):
                output = transformer(noisy, timestep, text, return_dict=False)[0]
            signal += float(wanted.double().square().sum())
            noise += float((output.double() - wanted.double()).square().sum())
        found.append(10 * math.log10(signal / noise) if noise else EQUAL_DB)
        on_video()
    return found


def _recorder(pipeline: CachedPipeline, pairs: list[Pair], tick: Callable[[], None]) -> Callable[[Path], None]:
    return lambda folder: _record(pipeline, pairs, folder, tick)


def _record(pipeline: CachedPipeline, pairs: list[Pair], folder: Path, tick: Callable[[], None]) -> None:
    asked: dict[str, list[torch.Tensor]] = {"noisy": [], "timestep": [], "output": []}

    def hook(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output.sample
        for name, tensor in (("noisy", kwargs["hidden_states"]), ("timestep", kwargs["timestep"]), ("output", output)):
            asked[name].append(tensor.detach().cpu())

    parts = transformers_in(pipeline.pipe).values()
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]
    try:
        samples = pipeline.generate(pairs, tick, decode=False)
    finally:
        for handle in handles:
            handle.remove()
    pipeline.keep(pairs, samples)
    branches = pipeline.model.generation.branches
    whole = {name: torch.stack(tensors) for name, tensors in asked.items()}
    save_file({name: t.view(-1, branches, *t.shape[1:]).contiguous() for name, t in whole.items()}, folder / FILE)
