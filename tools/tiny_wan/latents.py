"""The latent space of tiny-wan: principal components of 8×8×4 patches, as they are.

A VAE left to choose its own latents on such plain videos has come to an effective rank of 4.7 in 16
channels, and to a first frame coded unlike the others. Principal components are linear, of full rank
and the same for all frames. So the space is fixed first; the VAE is trained to encode into it and to
decode from it, better than the components themselves can, and the transformer is trained on it
without waiting for the VAE.

All components are divided by one number, so that the channels have unit variance on average and keep
their proportions: the first, the patch's colour, has a deviation of 3.9, the last of 0.12. Coarse
things then outlast the noise longest and are settled first; whitened, most of the loss is spent on
sparse details.

The first frame stands alone in its latent frame, as Wan's VAE has it: it counts as four equal ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wanquant.wan.tiny import all_scenes, draw

CHANNELS = 16
SCENES = [scene for scene in all_scenes() if not scene.held_out]


def to_model(video: np.ndarray) -> torch.Tensor:
    """uint8 [frames, H, W, 3] to float32 [3, frames, H, W] in -1..1."""
    return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def patches(videos: torch.Tensor) -> torch.Tensor:
    """[batch, 3, 1 + 4n, 8h, 8w] to [batch, n + 1, h, w, 768]."""
    batch, _, _, height, width = videos.shape
    whole = torch.cat([videos[:, :, :1].expand(-1, -1, 4, -1, -1), videos[:, :, 1:]], dim=2)
    split = whole.reshape(batch, 3, -1, 4, height // 8, 8, width // 8, 8)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


@dataclass(frozen=True)
class Components:
    """Mean [768] and basis [768, 16] of the patches, and by what the components are divided."""

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        """[batch, 3, frames, H, W] to latents [batch, 16, frames', H/8, W/8], of unit variance over all channels."""
        return (((patches(videos) - self.mean) @ self.basis) / self.scale).permute(0, 4, 1, 2, 3)

    def decode_patches(self, latents: torch.Tensor) -> torch.Tensor:
        """The linear reconstruction, as ``patches`` would give it."""
        return (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.basis.T + self.mean


def fit(seed: int = 0, videos: int = 900) -> Components:
    """Principal components over videos of the training scenes, in float64."""
    rng = np.random.default_rng((seed, 2))
    total, second, count = torch.zeros(768, dtype=torch.float64), torch.zeros(768, 768, dtype=torch.float64), 0
    for index in range(videos):
        rows = patches(to_model(draw(SCENES[index % len(SCENES)], rng))[None]).reshape(-1, 768).double()
        total += rows.sum(0)
        second += rows.T @ rows
        count += len(rows)
    mean = total / count
    values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    basis = vectors[:, -CHANNELS:].flip(1)
    # An eigenvector's sign is arbitrary: fixed here, so that every machine agrees on the latents.
    basis = basis * basis.sum(0).sign()
    return Components(mean.float(), basis.float(), values[-CHANNELS:].mean().sqrt().float())


def load_or_fit(path: Path, seed: int = 0) -> Components:
    if path.exists():
        return Components(**torch.load(path, weights_only=True))
    components = fit(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(vars(components), temporary)
    temporary.rename(path)
    return components
