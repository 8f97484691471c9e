"""What is trained on: samples, a row each, drawn by (seed, step).

``trajectories``  the BF16 model's own, of prompts: its inputs and outputs while it denoised
``scenes``        videos of tiny-wan's world, drawn here
``folder``        videos with captions, listed in a JSONL or CSV file

A video's latents are mixed with noise, x_σ = (1 - σ) x_0 + σ e, of which the velocity is e - x_0;
σ = su / (1 + (s - 1) u) with u uniform, stratified over the batch, and s the flow shift of generation (arXiv
2403.03206, section 5.3.2). A share of the captions is dropped, for classifier-free guidance.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from wanquant.choices import check_choices
from wanquant.evaluate.prompts import pairs
from wanquant.qat.config import DataConfig
from wanquant.runs.files import sum_of_file
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.data import Recording, encode_video, encoded, read_latents
from wanquant.wan.tiny import all_scenes, draw

#: Columns that a list of videos may have them under.
FILE_KEYS, CAPTION_KEYS = ("file", "video", "path", "file_name"), ("caption", "text", "prompt")


@dataclass(frozen=True)
class Batch:
    """``noisy`` [rows, channels, frames', h, w], ``timestep`` [rows], ``text`` [rows, length, width]; of videos the
    ``velocity`` is known, of trajectories BF16's ``output``."""

    noisy: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    velocity: torch.Tensor | None = None
    output: torch.Tensor | None = None


class Source(Protocol):
    """``batch`` is a function of its arguments alone: the given rows of the global batch of that step."""

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, rows: range) -> Batch: ...


def order(count: int, seed: int, first: int, size: int) -> list[int]:
    """The next ``size`` of ``count`` things after ``first`` have been taken: each once, in an order of its own, then
    again in another."""
    found: list[int] = []
    while len(found) < size:
        round_, place = divmod(first + len(found), count)
        shuffled = np.random.default_rng((seed, round_)).permutation(count)
        found += shuffled[place : place + size - len(found)].tolist()
    return found


@dataclass
class Trajectories:
    recording: Recording
    embed: Callable[[str], torch.Tensor]
    seed: int

    def __len__(self) -> int:
        return len(self.recording)

    def batch(self, step: int, size: int, rows: range) -> Batch:
        taken = order(len(self), self.seed, step * size, size)[rows.start : rows.stop]
        return self.of(taken)

    def video_of(self, place: int) -> int:
        """Which of the recorded videos a sample belongs to."""
        return place // (self.recording.steps * self.recording.branches)

    def of(self, places: Sequence[int]) -> Batch:
        asked = [self.recording[place] for place in places]
        return Batch(
            torch.stack([sample.noisy for sample in asked]),
            torch.stack([sample.timestep for sample in asked]),
            torch.stack([self.embed(sample.prompt) for sample in asked]),
            output=torch.stack([sample.output for sample in asked]),
        )


@dataclass
class Videos:
    """``files`` hold the latents of each video, or ``latents`` all of them."""

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
        taken = order(len(self), self.seed, step * size, size)
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


def make_source(
    pipeline: CachedPipeline, config: DataConfig, learned: Sequence[Pair], seed: int, measured: Collection[str] = ()
) -> Source:
    """From the cache, or made now with the model in BF16: trajectories of what is ``learned``, or videos, without
    scenes whose captions are ``measured`` on."""
    if config.source == "trajectories":
        return Trajectories(Recording(pipeline, list(learned)), pipeline.embed, seed)
    settings = pipeline.model.generation
    if config.source == "scenes":
        captions, latents = _scenes(pipeline, config.videos_per_scene, measured)
    else:
        listed = read_list(Path(config.path))
        files = encoded(pipeline, [path for path, _ in listed])
        captions, latents = [caption for _, caption in listed], lambda place: read_latents(files[place])
    return Videos(captions, latents, pipeline.embed, settings.negative_prompt, seed, settings.flow_shift, config.drop)


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


def read_list(path: Path) -> list[tuple[Path, str]]:
    """Videos and captions of a JSONL or CSV file; ``ValueError`` names the line that is wrong."""
    if path.is_dir():
        found = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has no metadata.jsonl or metadata.csv: list the videos and their captions there")
        path = found[0]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"qat.data.path={path}: {error}") from None
    rows = []
    for number, row in _rows(path, text):
        where = f"{path}, line {number}"
        file, caption = (next((row[key] for key in keys if row.get(key)), None) for keys in (FILE_KEYS, CAPTION_KEYS))
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"{where}: it needs a file and a caption ({FILE_KEYS[0]}, {CAPTION_KEYS[0]})")
        video = path.parent / file
        if not video.is_file():
            raise ValueError(f"{where}: there is no video {video}")
        rows.append((video, caption))
    if not rows:
        raise ValueError(f"{path} lists no videos")
    return rows


def _rows(path: Path, text: str) -> list[tuple[int, dict[str, object]]]:
    if path.suffix == ".csv":
        return [(number, dict(row)) for number, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not an object")
            rows.append((number, row))
    return rows


def captions_of(config: DataConfig) -> list[str]:
    """What is learned from, of a source that lists it."""
    if config.source == "trajectories":
        return [text for text, _ in pairs(config.prompts, "qat.data.prompts")]
    return [caption for _, caption in read_list(Path(config.path))]


def contents(config: DataConfig) -> dict[str, object]:
    """What the data are, for a signature: videos by their content."""
    if config.source == "trajectories":
        return {"source": config.source, "pairs": pairs(config.prompts, "qat.data.prompts")}
    found: dict[str, object] = {"source": config.source, "drop": config.drop}
    if config.source == "scenes":
        return {**found, "videos_per_scene": config.videos_per_scene}
    listed = read_list(Path(config.path))
    versions = ((path, path.stat()) for path, _ in listed)
    sums = _sums(tuple((path, told.st_size, told.st_mtime_ns) for path, told in versions))
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


def check_data(config: DataConfig, language: str) -> None:
    check_choices(config, "qat.data.")
    if config.source == "scenes" and language != "scenes":
        raise ValueError("qat.data.source=scenes draws what tiny-wan knows: choose trajectories or folder")
    if config.source == "folder" and not config.path:
        raise ValueError("qat.data.source=folder needs qat.data.path=<list, or folder with a metadata.jsonl or .csv>")
    if config.source == "folder":
        read_list(Path(config.path))
    if config.source == "scenes" and config.videos_per_scene < 1:
        raise ValueError(f"qat.data.videos_per_scene={config.videos_per_scene}: must be at least 1")
    if not 0 <= config.drop <= 1:
        raise ValueError(f"qat.data.drop={config.drop}: must lie between 0 and 1")
