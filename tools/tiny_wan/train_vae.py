"""Trains tiny-wan's VAE: an ``AutoencoderKLWan`` of 1.5 M parameters that compresses 8×8×4.

Single frames first (cheap, teaches the picture), then clips of nine frames, then whole videos:
the causal caches recur, and trained on nine frames alone the picture decays from 23 dB to 10 dB
behind the ninth. Last the decoder alone, while the latents stay as they are, so that the
transformer can be trained on them at the same time. The decoder's closing clamp is left out of the
training graph: where it saturates it has no gradient.

    python -m tools.tiny_wan.train_vae --out outputs/tiny_wan/vae

Resumable: started again with the same arguments it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from tools.tiny_wan.checkpoint import load_state, log_row, save_state
from tools.tiny_wan.scenes import draw
from wanquant.wan.tiny import NUM_FRAMES, all_scenes

CONFIG = {
    "base_dim": 24,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "z_dim": 16,
}


@dataclass(frozen=True)
class Phase:
    """Steps on clips of so many frames; the learning rate falls from ``lr`` to a fiftieth by a cosine."""

    steps: int
    frames: int
    batch: int
    lr: float
    decoder_only: bool = False

    def lr_at(self, index: int) -> float:
        warm, decay = min(1.0, (index + 1) / 50), 0.5 * (1 + math.cos(math.pi * index / self.steps))
        return self.lr * warm * (0.02 + 0.98 * decay)


PHASES = (
    Phase(2500, 1, 4, 2e-3),
    Phase(700, 9, 2, 1.4e-3),
    Phase(1400, 17, 2, 1.4e-3),
    Phase(1500, 17, 2, 1e-3, decoder_only=True),
)
SCENES = [scene for scene in all_scenes() if not scene.held_out]


def to_model(video: np.ndarray) -> torch.Tensor:
    """uint8 [frames, H, W, 3] to float32 [3, frames, H, W] in -1..1."""
    return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def batch(step: int, seed: int, size: int, frames: int) -> torch.Tensor:
    """The videos of one step, a function of (seed, step) alone, so that a resumed run sees the same ones."""
    rng = np.random.default_rng((seed, step))
    scenes = rng.choice(len(SCENES), size)
    return torch.stack([to_model(draw(SCENES[i], rng, frames)) for i in scenes])


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """``vae.decode`` without its clamp to [-1, 1], so that gradients reach saturated pixels."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


@torch.no_grad()
def new_vae() -> AutoencoderKLWan:
    """A fresh VAE that starts with unit gain and a nearly silent posterior (standard deviation 0.05).

    torch's default convolutions shrink a signal by sqrt(3), and eight of them in a row leave the
    latents below their own noise: training then sits on a plateau for hundreds of steps.
    """
    vae = AutoencoderKLWan(**CONFIG)
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.weight.mul_(math.sqrt(3.0))
            if module.bias is not None:
                module.bias.zero_()
    vae.quant_conv.bias[CONFIG["z_dim"] :] = -6.0
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, seed: int = 10_000, count: int = 16) -> float:
    """Mean PSNR in dB (peak 1) of whole 17-frame videos through encode (mean) and decode."""
    video = batch(0, seed, count, NUM_FRAMES)
    errors = []
    for chunk in video.split(4):
        out = vae.decode(vae.encode(chunk).latent_dist.mode()).sample
        errors.append(((out - chunk) / 2).square().mean((1, 2, 3, 4)))
    return float((-10 * torch.cat(errors).log10()).mean())


def train(out: Path, phases: Sequence[Phase], kl_weight: float, seed: int, stop_at: int | None = None) -> None:
    """Runs the phases one after the other, from the last checkpoint in ``out``; ``stop_at`` a step to go on later."""
    torch.manual_seed(seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=phases[0].lr, betas=(0.9, 0.99), weight_decay=0.0)
    plan = [(phase, index) for phase in phases for index in range(phase.steps)][:stop_at]
    first, started = load_state(out, vae, optimizer), time.time()
    for step, (phase, index) in enumerate(plan[first:], first):
        optimizer.param_groups[0]["lr"] = phase.lr_at(index)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not phase.decoder_only)
        video = batch(step, seed, phase.batch, phase.frames)
        torch.manual_seed(seed * 1_000_003 + step)
        posterior = vae.encode(video).latent_dist
        mse = F.mse_loss(decode_unclamped(vae, posterior.sample()), video)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (mse + kl_weight * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        if step % 20 == 0:
            row = {"step": step, "frames": phase.frames, "mse": mse.item(), "kl": kl.item(), "grad_norm": norm.item()}
            log_row(out / "curve.csv", row)
            left = (time.time() - started) / (step - first + 1) * (phase.steps - index - 1)
            print(f"{step}/{len(plan)} mse {mse.item():.5f} kl {kl.item():.2f} phase ends in {left / 60:.1f} min")
        if (step + 1) % 100 == 0 or step + 1 == len(plan):
            save_state(out, vae, optimizer, step + 1)
            print(f"psnr over {NUM_FRAMES} frames: {psnr(vae):.2f} dB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phases", type=int, default=len(PHASES), help="how many of the phases to run")
    parser.add_argument("--kl", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, PHASES[: args.phases], args.kl, args.seed)


if __name__ == "__main__":
    main()
