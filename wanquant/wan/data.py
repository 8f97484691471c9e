"""What training learns from, kept in the cache: videos as latents, and what the BF16 transformer took and gave.

Videos are decoded by PyAV, brought to the model's size and encoded by its VAE. Latents are as the pipeline has them,
(z - mean) / std of the VAE's config, with z the mean of the posterior. Of a video the middle is taken that has the
picture's proportions, and frames at the model's rate from its beginning.

Recorded steps are the data of distillation, which needs no videos: a noisy latent with its timestep and prompt, and the
output for it. A guided model runs twice in a denoising step, with the prompt and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanquant.runs.files import sum_of_file
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.config import GenerationConfig
from wanquant.wan.experts import transformers_in
from wanquant.wan.load import Pipeline
from wanquant.wan.products import quick_products

#: Recorded steps run together at most (one where videos are made one at a time: they would share their scales), and
#: what equal outputs count, as everywhere.
AT_ONCE, EQUAL_DB = 40, 100.0
#: Kinds of artefacts, and the file in the folder of each.
ENCODED, LATENTS = "encoded", "latents.safetensors"
RECORDED, STEPS = "trajectories", "trajectories.safetensors"


@torch.no_grad()
def encode_video(pipe: Pipeline, frames: torch.Tensor) -> torch.Tensor:
    """float32 [frames, height, width, 3] in 0..1 to latents, float32 [channels, frames', h, w]."""
    vae = pipe.vae
    pixels = (2 * frames.permute(3, 0, 1, 2)[None] - 1).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode().float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    found: torch.Tensor = ((latents - mean) / std)[0].cpu()
    return found


def read_video(path: Path, settings: GenerationConfig) -> torch.Tensor:
    """float32 [frames, height, width, 3] in 0..1; ``ValueError`` if it cannot be read or is too short."""
    wanted: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or settings.fps)
            for number, frame in enumerate(container.decode(stream)):
                while len(wanted) < settings.num_frames and len(wanted) * rate / settings.fps < number + 0.5:
                    wanted.append(frame.to_ndarray(format="rgb24"))
                if len(wanted) == settings.num_frames:
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"cannot read the video {path}: {error}") from None
    if len(wanted) < settings.num_frames:
        raise ValueError(
            f"{path} has {len(wanted)} frames at {settings.fps} a second, and the model takes {settings.num_frames}"
        )
    return fit(torch.from_numpy(np.stack(wanted)).float() / 255, settings.height, settings.width)


def fit(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[frames, H, W, 3] to [frames, height, width, 3]: the middle, scaled."""
    tall, wide = frames.shape[1:3]
    scale = max(height / tall, width / wide)
    crop_h, crop_w = min(tall, round(height / scale)), min(wide, round(width / scale))
    top, left = (tall - crop_h) // 2, (wide - crop_w) // 2
    cut = frames[:, top : top + crop_h, left : left + crop_w].permute(0, 3, 1, 2)
    if cut.shape[2:] == (height, width):
        return cut.permute(0, 2, 3, 1)
    scaled = F.interpolate(cut, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled.clamp(0, 1).permute(0, 2, 3, 1)


def encoded(pipeline: CachedPipeline, files: Sequence[Path], label: str = "encode videos") -> list[Path]:
    """For each video the file of its latents, which ``read_latents`` takes; made once, whatever the video is called."""
    settings = pipeline.model.generation
    found = []
    with progress(label, len(files), "video") as tick:
        for path in files:
            try:
                content = sum_of_file(path)
            except OSError as error:
                raise ValueError(f"cannot read the video {path}: {error.strerror or error}") from None

            def make(folder: Path, path: Path = path) -> None:
                latents = encode_video(pipeline.pipe, read_video(path, settings))
                save_file({"latents": latents.contiguous()}, folder / LATENTS)

            signed = pipeline.signature(ENCODED, video=content, fps=settings.fps)
            found.append(pipeline.cache.folder(ENCODED, signed, make) / LATENTS)
            tick()
    return found


def read_latents(path: Path) -> torch.Tensor:
    return load_file(path)["latents"]


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
        groups = pipeline.grouped(pairs)
        folders = pipeline.folders(RECORDED, label, groups, partial(_record, pipeline))
        self._place = [
            (prompt, folder / STEPS, row)
            for group, folder in zip(groups, folders, strict=True)
            for row, (prompt, _) in enumerate(group)
        ]

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
        return self._place[pair_place], step, branch


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
                torch.stack([getattr(step, name) for step in asked]).to(device)
                for name in ("noisy", "timestep", "output")
            )
            text = torch.stack([pipeline.embed(step.prompt) for step in asked]).to(device)
            with quick_products(device):
                output = transformer(noisy, timestep, text, return_dict=False)[0]
            signal += float(wanted.double().square().sum())
            noise += float((output.double() - wanted.double()).square().sum())
        found.append(10 * math.log10(signal / noise) if noise else EQUAL_DB)
        on_video()
    return found


def _record(pipeline: CachedPipeline, pairs: list[Pair], tick: Callable[[], None], folder: Path) -> None:
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
    save_file({name: t.view(-1, branches, *t.shape[1:]).contiguous() for name, t in whole.items()}, folder / STEPS)
