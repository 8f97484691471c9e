"""Videos to train on, kept in the cache as latents.

Videos are decoded by PyAV, brought to the model's size and encoded by its VAE. Latents are as the pipeline has them,
(z - mean) / std of the VAE's config, with z the mean of the posterior. Of a video the middle is taken that has the
picture's proportions, and frames at the model's rate from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from wanquant.runs.files import sum_of_file
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.config import GenerationConfig
from wanquant.wan.load import Pipeline

#: Kind of artefact, and the file in its folder.
ENCODED, LATENTS = "encoded", "latents.safetensors"


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
