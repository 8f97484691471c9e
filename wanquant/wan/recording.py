"""BF16 trajectories, kept in the cache: what the transformer took and gave in each denoising step.

They are the data of distillation, which needs no videos, and what single denoising steps are measured by: a quantized
transformer is given BF16's own noisy latents and its output is compared with BF16's, before the sampler adds errors up.
A pass is replayed as it was recorded, the same videos in the same batch, so that BF16 itself gives the same bits.

A guided model computes two branches in a denoising step, with the prompt and without: in two passes, or in one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.experts import transformers_in
from wanquant.wan.load import Pipeline
from wanquant.wan.products import quick_products
from wanquant.wan.resources.placement import streamed

#: Kind of artefact, and the file in its folder.
RECORDED, STEPS = "trajectories", "trajectories.safetensors"
#: In its metadata, what passes were given besides tensors; and what changes from step to step.
GIVEN, BY_STEP = "given", ("hidden_states", "timestep")
#: Decibels reported at most, and for two that are equal, whose ratio is infinite: means need a number.
EQUAL_DB = 100.0


@dataclass(frozen=True)
class RecordedStep:
    """``noisy`` and ``output`` as the model took and gave them, [channels, frames', h, w]."""

    noisy: torch.Tensor
    timestep: torch.Tensor
    prompt: str
    output: torch.Tensor


class Recording:
    """Recorded steps of these pairs: ``len(recording)`` of them, pair by pair, step by step, branch by branch.

    pairs     (prompt, seed), in the batches they were made in
    kept      the denoising steps, by their index in the trajectory
    steps     how many these are
    branches  1, or 2 where the model is guided
    frames    of the videos
    """

    def __init__(
        self, pipeline: CachedPipeline, pairs: Sequence[Pair], label: str = "record BF16", most: int | None = None
    ) -> None:
        """From the cache, or made now, with the model in BF16. Of each trajectory ``most`` steps are kept, spread
        evenly over it; all unless told otherwise."""
        generation = pipeline.model.generation
        self.pairs, self.frames, self.branches = list(pairs), generation.num_frames, generation.branches
        self.negative = generation.negative_prompt
        self.kept = spread(generation.steps, most or generation.steps)
        self.steps = len(self.kept)
        groups = pipeline.grouped(pairs)
        how = {} if self.steps == generation.steps else {"kept": self.kept}
        folders = pipeline.folders(RECORDED, label, groups, partial(_record, pipeline, self.kept), **how)
        pipeline.note(label, known=not pipeline.cache.made.intersection(folders))
        self.groups = [(group, folder / STEPS) for group, folder in zip(groups, folders, strict=True)]
        self._place = [(pair[0], path, row) for group, path in self.groups for row, pair in enumerate(group)]

    def __len__(self) -> int:
        return len(self._place) * self.steps * self.branches

    def __getitem__(self, place: int) -> RecordedStep:
        (prompt, path, row), step, branch = self._find(place)
        with safe_open(path, "pt") as file:
            noisy, timestep = (file.get_slice(name)[step, row] for name in ("noisy", "timestep"))
            output = file.get_slice("output")[step, branch, row]
        return RecordedStep(noisy, timestep, prompt if branch == 0 else self.negative, output)

    def timestep(self, place: int) -> float:
        (_, path, row), step, _ = self._find(place)
        with safe_open(path, "pt") as file:
            return float(file.get_slice("timestep")[step, row].max())

    def _find(self, place: int) -> tuple[tuple[str, Path, int], int, int]:
        """Its prompt, file and row there; its step and branch."""
        asked, branch = divmod(place, self.branches)
        pair_place, step = divmod(asked, self.steps)
        return self._place[pair_place], step, branch

    @property
    def passes(self) -> int:
        """Denoising steps of batches, all in all."""
        return len(self.groups) * self.steps

    def timesteps(self) -> list[float]:
        """Of the steps, which are those of every pair."""
        return [self.timestep(step * self.branches) for step in range(self.steps)]


def spread(count: int, most: int) -> list[int]:
    """``most`` indices below ``count``, each in the middle of its share of them."""
    most = min(count, most)
    return [(2 * place + 1) * count // (2 * most) for place in range(most)]


@torch.no_grad()
def step_sqnrs(
    pipeline: CachedPipeline, recording: Recording, batch: int, on_step: Callable[[], None]
) -> list[list[list[float]]]:
    """SQNR in dB of the outputs of the transformer as it is now, by pair of a batch, step and branch; NaN where one is
    not finite. ``on_step`` is called after each step."""
    pairs, path = recording.groups[batch]
    errors = torch.empty(len(pairs), recording.steps, recording.branches, dtype=torch.float64)
    with streamed(transformers_in(pipeline.pipe).values()):
        for step, branch, output, expected in _replayed(pipeline, recording, path):
            signal, noise = (each.flatten(1).square().sum(1) for each in (expected, output - expected))
            decibels = torch.where((noise == 0) & signal.isfinite(), EQUAL_DB, 10 * torch.log10(signal / noise))
            errors[:, step, branch] = torch.where(
                output.flatten(1).isfinite().all(1), decibels.clamp(max=EQUAL_DB), torch.nan
            )
            if branch == recording.branches - 1:
                on_step()
    found: list[list[list[float]]] = errors.tolist()
    return found


def _replayed(
    pipeline: CachedPipeline, recording: Recording, path: Path
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Step, branch, and the batch's outputs now and as recorded, in float64."""
    device, transformer, settings = pipeline.device, pipeline.transformer, pipeline.model.generation
    with safe_open(path, "pt") as file:
        noisy, timestep, expected = (file.get_slice(name) for name in ("noisy", "timestep", "output"))
        given = [_given(file, number, device) for number in range(settings.passes)]
        for step in range(recording.steps):
            now, branch = {"hidden_states": noisy[step].to(device), "timestep": timestep[step].to(device)}, 0
            for each in given:
                with quick_products(device):
                    output = transformer(**now, **each, return_dict=False)[0]
                for part in _branches(output, settings.together):
                    yield step, branch, part.cpu().double(), expected[step, branch].double()  # not all devices have it
                    branch += 1


def _branches(output: torch.Tensor, together: int) -> Iterable[torch.Tensor]:
    """Of a pass: with the prompt, and without, whose rows come first."""
    return reversed(output.chunk(together))


def _given(file: Any, number: int, device: torch.device) -> dict[str, Any]:
    """The same in every step, of a step's pass of this number: what is not that of the first one, and the rest."""
    start = f"{GIVEN}.{number}."
    tensors = {n.removeprefix(start): file.get_tensor(n).to(device) for n in file.keys() if n.startswith(start)}  # noqa: SIM118
    others: dict[str, Any] = json.loads(file.metadata()[GIVEN]) if number == 0 else _given(file, 0, device)
    return others | tensors


def _record(
    pipeline: CachedPipeline, kept: list[int], pairs: list[Pair], tick: Callable[[], None], folder: Path
) -> None:
    settings, seen = pipeline.model.generation, 0
    found: dict[str, list[torch.Tensor]] = {"noisy": [], "timestep": [], "output": []}
    given: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}

    def hook(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal seen
        step, number = divmod(seen, settings.passes)
        seen += 1
        for name, value in kwargs.items():
            if name in (*BY_STEP, "return_dict") or value is None:
                continue
            known = given.get(f"{GIVEN}.0.{name}")
            if not isinstance(value, torch.Tensor):
                others[name] = value
            elif known is not None and torch.equal(known, value.cpu()):
                continue  # in all passes
            elif not torch.equal(given.setdefault(f"{GIVEN}.{number}.{name}", value.detach().cpu()), value.cpu()):
                raise RuntimeError(f"{name} changes from step to step, and single steps are recorded without")
        if step not in kept:
            return
        output = output[0] if isinstance(output, tuple) else output.sample
        found["output"] += [part.detach().cpu() for part in _branches(output, settings.together)]
        if number == 0:  # all passes take the same
            found["noisy"].append(kwargs["hidden_states"].detach().cpu())
            found["timestep"].append(kwargs["timestep"].detach().cpu())

    samples = _generate_watched(pipeline, pairs, tick, hook)
    pipeline.keep(pairs, samples)
    whole = {name: torch.stack(tensors) for name, tensors in found.items()}
    whole["output"] = whole["output"].view(-1, settings.branches, *whole["output"].shape[1:])
    tensors = {name: tensor.contiguous() for name, tensor in {**whole, **given}.items()}
    save_file(tensors, folder / STEPS, metadata={GIVEN: json.dumps(others)})


def _generate_watched(pipeline: CachedPipeline, pairs: list[Pair], tick: Callable[[], None], hook: Any) -> Any:
    pipe: Pipeline = pipeline.pipe
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in transformers_in(pipe).values()]
    try:
        return pipeline.generate(pairs, tick, decode=False)
    finally:
        for handle in handles:
            handle.remove()
