"""What is trained on: samples, a row each, drawn by (seed, step).

``trajectories``  the BF16 model's own, of prompts: its inputs and outputs while it denoised
``scenes``        videos of tiny-wan's world, drawn here
``folder``        videos with captions, listed in a JSONL or CSV file

A video's latents are mixed with noise, x_σ = (1 - σ) x_0 + σ e, of which the velocity is e - x_0;
σ = su / (1 + (s - 1) u) with u uniform, stratified over the batch, and s the flow shift of generation (arXiv
2403.03206, section 5.3.2). A share of the captions is dropped, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from wanquant.evaluate.prompts import pairs
from wanquant.qat.config import DataConfig
from wanquant.qat.train_config import read_list
from wanquant.runs.files import sum_of_file
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.data import encode_video, encoded, read_latents
from wanquant.wan.recording import Recording
from wanquant.wan.tiny import all_scenes, draw


@dataclass(frozen=True)
class Batch:
    """``noisy`` [rows, channels, frames', h, w], ``timestep`` [rows], ``text`` [rows, length, width]; of videos the
    ``velocity`` is known, of trajectories BF16's ``output``."""

    noisy: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    velocity: torch.Tensor | None = None
    output: torch.Tensor | None = None


def shuffled_order(count: int, seed: int, first: int, size: int) -> list[int]:
    """``size`` indices below ``count``, from position ``first`` on of an endless sequence: all of them in a random
    order, then all in another, and so on."""
    found: list[int] = []
    while len(found) < size:
        round_, place = divmod(first + len(found), count)
        shuffled = np.random.default_rng((seed, round_)).permutation(count)
        found += shuffled[place : place + size - len(found)].tolist()
    return found


@dataclass
class Trajectories:
    """BF16's own inputs and outputs; ``embed`` gives a prompt's text embedding."""

    recording: Recording
    embed: Callable[[str], torch.Tensor]
    seed: int

    def __len__(self) -> int:
        return len(self.recording)

    def batch(self, step: int, size: int, rows: range) -> Batch:
        return self.of(shuffled_order(len(self), self.seed, step * size, size)[rows.start : rows.stop])

    def video_of(self, place: int) -> int:
        """Which of the recorded videos a sample belongs to."""
        return place // (self.recording.steps * self.recording.branches)

    def of(self, places: Sequence[int]) -> Batch:
        samples = [self.recording[place] for place in places]
        noisy, timestep, output = (
            torch.stack([getattr(sample, name) for sample in samples]) for name in ("noisy", "timestep", "output")
        )
        return Batch(noisy, timestep, torch.stack([self.embed(sample.prompt) for sample in samples]), output=output)


@dataclass
class Videos:
    """``latents`` gives those of a video by its place; ``negative`` is the prompt where a caption is dropped."""

    captions: list[str]
    latents: Callable[[int], torch.Tensor]
    embed: Callable[[str], torch.Tensor]
    negative: str
    seed: int
    shift: float
    drop: float

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, step: int, size: int, rows: range) -> Batch:
        taken = shuffled_order(len(self), self.seed, step * size, size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        dropped = torch.rand(size, generator=generator) < self.drop
        uniform = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        sigma = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        clean, noise, text = [], [], []
        for row in rows:
            clean.append(self.latents(taken[row]))
            alone = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + row)
            noise.append(torch.randn(clean[-1].shape, generator=alone))
            text.append(self.embed(self.negative if dropped[row] else self.captions[taken[row]]))
        x, e, weight = torch.stack(clean), torch.stack(noise), sigma[rows.start : rows.stop].view(-1, 1, 1, 1, 1)
        return Batch((1 - weight) * x + weight * e, 1000 * weight.flatten(), torch.stack(text), velocity=e - x)


#: Their ``batch`` gives some rows of a step's global batch, and is a function of its arguments alone.
Source = Trajectories | Videos


def make_source(
    pipeline: CachedPipeline, config: DataConfig, learned: Sequence[Pair], seed: int, measured: Collection[str] = ()
) -> Source:
    """From the cache, or made now with the model in BF16: trajectories of what is ``learned``, or videos, without
    scenes whose captions are ``measured`` on."""
    if config.source == "trajectories":
        return Trajectories(Recording(pipeline, list(learned), "record training data"), pipeline.embedding, seed)
    settings = pipeline.model.generation
    if config.source == "scenes":
        captions, latents = _scenes(pipeline, config.videos_per_scene, measured)
    else:
        listed = read_list(Path(config.path))
        files = encoded(pipeline, [path for path, _ in listed])
        captions, latents = [caption for _, caption in listed], lambda place: read_latents(files[place])
    shift = settings.flow_shift or pipeline.pipe.scheduler.config.flow_shift
    return Videos(captions, latents, pipeline.embedding, settings.negative_prompt, seed, shift, config.drop)


def _scenes(
    pipeline: CachedPipeline, each: int, measured: Collection[str]
) -> tuple[list[str], Callable[[int], torch.Tensor]]:
    """So many videos of each combination that tiny-wan was trained on, but for those that are measured on."""
    scenes = [scene for scene in all_scenes() if not scene.held_out]

    def make(folder: Path) -> None:
        made = []
        with progress("draw and encode", len(scenes) * each, "video") as tick:
            for number, scene in enumerate(scenes):
                rng = np.random.default_rng((7, number))
                for _ in range(each):
                    frames = draw(scene, rng, pipeline.model.generation.num_frames)
                    made.append(encode_video(pipeline.pipe, torch.from_numpy(frames).float() / 255))
                    tick()
        save_file({"latents": torch.stack(made)}, folder / "scenes.safetensors")

    folder = pipeline.artefact("scenes", "scenes", pipeline.signature("scenes", each=each), make)
    latents = read_latents(folder / "scenes.safetensors")
    captions = [scene.caption for scene in scenes for _ in range(each)]
    left = [place for place, caption in enumerate(captions) if caption not in measured]
    return [captions[place] for place in left], lambda place: latents[left[place]]


def contents(config: DataConfig) -> dict[str, object]:
    """What the data are, for a signature: videos by their content."""
    if config.source == "trajectories":
        return {"source": config.source, "pairs": pairs(config.prompts, "qat.data.prompts")}
    found: dict[str, object] = {"source": config.source, "drop": config.drop}
    if config.source == "scenes":
        return {**found, "videos_per_scene": config.videos_per_scene}
    listed = read_list(Path(config.path))
    versions = ((path, path.stat()) for path, _ in listed)
    sums = _sums(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in versions))
    return {**found, "videos": [(sum_, caption) for sum_, (_, caption) in zip(sums, listed, strict=True)]}


@cache
def _sums(versions: tuple[tuple[Path, int, int], ...]) -> list[str]:
    """Of these files, of such sizes and times of change: read once in a process, as long as nobody writes to them."""
    found = []
    with progress("read", len(versions), "video") as tick:
        for path, _, _ in versions:
            found.append(sum_of_file(path))
            tick()
    return found
