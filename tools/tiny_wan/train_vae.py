"""Trains tiny-wan's VAE: an ``AutoencoderKLWan`` of 1.5 M parameters that compresses 8×8×4.

Its latents are given (``tools.tiny_wan.latents``): the encoder learns to compute them, the decoder
to undo them, each by itself but in one loop. Single frames first, which is cheap, then whole videos:
the causal caches recur, and trained on nine frames alone the picture decays from 23 dB to 10 dB
behind the ninth. The decoder's closing clamp is left out of the training graph: where it saturates
it has no gradient.

    python -m tools.tiny_wan.train_vae --latents outputs/tiny_wan/latents.pt --out outputs/tiny_wan/vae

Resumable: started again with the same arguments it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from tools.tiny_wan.latents import CHANNELS, SCENES, Components, load_or_fit, to_model
from wanquant.qat.config import LoopConfig
from wanquant.qat.loop import Hooks, Loop, Row, make_accelerator
from wanquant.wan.tiny import NUM_FRAMES, draw

CONFIG = {
    "base_dim": 24,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "z_dim": CHANNELS,
}


#: Standard deviation of the noise the decoder is trained with, and of the posterior (latents have 1).
NOISE = 0.03


@dataclass(frozen=True)
class Phase:
    """Steps on clips of so many frames; the learning rate falls from ``lr`` to a fiftieth by a cosine."""

    steps: int
    frames: int
    batch: int
    lr: float

    def lr_at(self, index: int) -> float:
        warm, decay = min(1.0, (index + 1) / 50), 0.5 * (1 + math.cos(math.pi * index / self.steps))
        return self.lr * warm * (0.02 + 0.98 * decay)


PHASES = (Phase(1500, 1, 4, 2e-3), Phase(2000, 17, 2, 1.5e-3))


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
    """A fresh VAE of unit gain whose latents are used as they are: mean 0, deviation 1, fixed posterior noise.

    torch's default convolutions shrink a signal by sqrt(3), and eight of them in a row sit on a
    plateau for hundreds of steps.
    """
    vae = AutoencoderKLWan(
        **CONFIG,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.weight.mul_(math.sqrt(3.0))
            if module.bias is not None:
                module.bias.zero_()
    vae.quant_conv.weight[CHANNELS:] = 0.0
    vae.quant_conv.bias[CHANNELS:] = 2 * math.log(NOISE)
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


def train(out: Path, components: Components, phases: Sequence[Phase], seed: int, stop_at: int | None = None) -> None:
    """Runs the phases one after the other, from the last checkpoint in ``out``; ``stop_at`` a step to go on later."""
    torch.manual_seed(seed)
    vae = new_vae()
    highest = max(phase.lr for phase in phases)
    plan = [(phase, index) for phase in phases for index in range(phase.steps)]

    def loss(model: torch.nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
        phase, _ = plan[step]
        video = batch(step, seed, phase.batch, phase.frames)
        target = components.encode(video)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        latent_mse = F.mse_loss(vae.encode(video).latent_dist.mean, target)
        pixel_mse = F.mse_loss(decode_unclamped(vae, target + NOISE * noise), video)
        # The two share no parameter, so their sum trains each as if it were alone, and each is clipped apart.
        return {"loss": latent_mse + pixel_mse, "latents": latent_mse, "pixels": pixel_mse}

    def check(step: int) -> Row:
        return {"psnr": psnr(vae)}

    def show(row: Row) -> None:
        if "psnr" in row:
            print(f"psnr over {NUM_FRAMES} frames: {row['psnr']:.2f} dB", flush=True)

    optimizer = torch.optim.AdamW(vae.parameters(), lr=highest, betas=(0.9, 0.99), weight_decay=0.0)
    # A "row" is a whole batch: it is drawn as one, for one process.
    config = LoopConfig(len(plan), batch=1, clip=0.5, save_every=100, seed=seed, diverged=math.inf)
    loop = Loop(
        make_accelerator(torch.device("cpu")),
        vae,
        [optimizer],
        lambda step: plan[step][0].lr_at(plan[step][1]) / highest,
        loss,
        config,
        out,
        f"{tuple(phases)} seed={seed}",
        apart=[list(part.parameters()) for part in (vae.encoder, vae.decoder)],
    )
    loop.run("train VAE", Hooks(check=check, check_every=100, show=show), stop_at)
    loop.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=Path, required=True, help="file of the latent space, made if it is not there")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, load_or_fit(args.latents), PHASES, args.seed)


if __name__ == "__main__":
    main()
