"""What a Wan transformer was asked, and answered, while it denoised: the data of distillation, which need no videos.

A question is a noisy latent with its timestep and prompt; a model that is guided is asked twice in every step, with the
prompt and without. Kept batch by batch, as they are made; read one at a time.
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

from wanquant.wan.experts import transformers_in
from wanquant.wan.products import quick_products
from wanquant.wan.studio import Pair, Studio

#: Questions asked together at most (one where videos are made one at a time: they would share their scales), and what
#: equal answers count, as everywhere.
AT_ONCE, EQUAL_DB = 40, 100.0
KIND, FILE = "trajectories", "trajectories.safetensors"


@dataclass(frozen=True)
class Question:
    """``noisy`` and ``answer`` as the model took and gave them, [channels, frames', h, w]."""

    noisy: torch.Tensor
    timestep: torch.Tensor
    prompt: str
    answer: torch.Tensor


class Recording:
    """All questions of these pairs: ``len(recording)`` of them, pair by pair, step by step, branch by branch."""

    def __init__(self, studio: Studio, pairs: Sequence[Pair], label: str = "record BF16") -> None:
        """From the cache, or made now, with the model in BF16."""
        self.negative = studio.model.generation.negative_prompt
        self.steps = studio.model.generation.steps
        self.branches = studio.model.generation.branches
        self._place: list[tuple[Pair, Path, int]] = []
        batch = studio.model.batch
        groups = [list(pairs[first : first + batch]) for first in range(0, len(pairs), batch)]
        signatures = [studio.signature(KIND, pairs=group) for group in groups]
        missing = [
            p for group, each in zip(groups, signatures, strict=True) if not studio.cache.has(KIND, each) for p in group
        ]
        with studio.progress(label, missing) as tick:
            for group, each in zip(groups, signatures, strict=True):
                folder = studio.cache.folder(KIND, each, _recorder(studio, group, tick))
                self._place += [(pair, folder / FILE, row) for row, pair in enumerate(group)]

    def __len__(self) -> int:
        return len(self._place) * self.steps * self.branches

    def __getitem__(self, place: int) -> Question:
        (prompt, path, row), step, branch = self._find(place)
        with safe_open(path, "pt") as file:
            noisy, answer = (file.get_slice(name)[step, branch, row] for name in ("noisy", "answer"))
            timestep = file.get_slice("timestep")[step, branch, row]
        return Question(noisy, timestep, prompt if branch == 0 else self.negative, answer)

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
def answer_errors(studio: Studio, recording: Recording, on_questions: Callable[[], None]) -> list[float]:
    """For each pair the SQNR in dB of what the transformer, as it is now, answers to all of its questions: the error
    of single steps, before the sampler has added them up. ``on_questions`` is called for each pair."""
    transformer, found = studio.transformer, []
    each, device, at_once = recording.steps * recording.branches, studio.device, min(AT_ONCE, studio.model.batch)
    for first in range(0, len(recording), each):
        signal = noise = 0.0
        for start in range(first, first + each, at_once):
            asked = [recording[place] for place in range(start, min(start + at_once, first + each))]
            noisy, timestep, wanted = (
                torch.stack([getattr(question, name) for question in asked]).to(device)
                for name in ("noisy", "timestep", "answer")
            )
            text = torch.stack([studio.embed(question.prompt) for question in asked]).to(device)
            with quick_products(device):
                answer = transformer(noisy, timestep, text, return_dict=False)[0]
            signal += float(wanted.double().square().sum())
            noise += float((answer.double() - wanted.double()).square().sum())
        found.append(10 * math.log10(signal / noise) if noise else EQUAL_DB)
        on_questions()
    return found


def _recorder(studio: Studio, pairs: list[Pair], tick: Callable[[], None]) -> Callable[[Path], None]:
    return lambda folder: _record(studio, pairs, folder, tick)


def _record(studio: Studio, pairs: list[Pair], folder: Path, tick: Callable[[], None]) -> None:
    asked: dict[str, list[torch.Tensor]] = {"noisy": [], "timestep": [], "answer": []}

    def hook(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        answer = output[0] if isinstance(output, tuple) else output.sample
        for name, tensor in (("noisy", kwargs["hidden_states"]), ("timestep", kwargs["timestep"]), ("answer", answer)):
            asked[name].append(tensor.detach().cpu())

    parts = transformers_in(studio.pipe).values()
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in parts]
    try:
        samples = studio.generate(pairs, tick, decode=False)
    finally:
        for handle in handles:
            handle.remove()
    studio.keep(pairs, samples)
    branches = studio.model.generation.branches
    whole = {name: torch.stack(tensors) for name, tensors in asked.items()}
    save_file({name: t.view(-1, branches, *t.shape[1:]).contiguous() for name, t in whole.items()}, folder / FILE)
