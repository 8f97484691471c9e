"""Trains tiny-wan's transformer together with its text encoder, by flow matching.

x_sigma = (1 - sigma) x_0 + sigma e,  target v = e - x_0,  sigma = 3u / (1 + 2u) with u uniform:
the flow shift of generation, applied in training too (arXiv 2403.03206, section 5.3.2). A tenth of
the captions is dropped to the empty string, for classifier-free guidance. The text is encoded just
as ``WanPipeline`` does it, at the same length and with zeros behind the last token, because Wan's
cross-attention attends to the padding.

The videos are drawn and encoded once; a step reads latents. Batches, noise and dropout are functions of
(seed, step) alone, so a resumed run goes on with what an uninterrupted one would have seen.

    python -m tools.tiny_wan.train_transformer --latents outputs/tiny_wan/latents.pt --out outputs/tiny_wan/transformer
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from tools.tiny_wan.checkpoint import load_state, log_row, save_state
from tools.tiny_wan.latents import SCENES, Components, load_or_fit, to_model
from tools.tiny_wan.scenes import draw

TEXT_LENGTH = 64
FLOW_SHIFT = 3.0
TEXT_CONFIG = {
    "vocab_size": 384,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
TRANSFORMER_CONFIG = {
    "num_layers": 40,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 512,
    "text_dim": TEXT_CONFIG["d_model"],
    "in_channels": 16,
    "out_channels": 16,
}


class TextToVelocity(torch.nn.Module):
    """Text encoder and transformer as one module: one optimizer, one EMA, one checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(noisy, 1000.0 * sigma, text, return_dict=False)[0]


def draw_latents(components: Components, per_scene: int, seed: int) -> dict[str, torch.Tensor]:
    """Latents [videos, 16, 5, 8, 8] of freshly drawn videos, and the index of each one's scene."""
    latents = []
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng((seed, 1, index))
        latents.append(components.encode(torch.stack([to_model(draw(scene, rng)) for _ in range(per_scene)])))
    return {"latents": torch.cat(latents), "scene": torch.arange(len(SCENES)).repeat_interleave(per_scene)}


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    out = ByT5Tokenizer()(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


@dataclass(frozen=True)
class Recipe:
    """``drop`` is the share of captions replaced by the empty one."""

    steps: int = 5000
    batch: int = 16
    lr: float = 1e-3
    drop: float = 0.1
    seed: int = 0

    def lr_at(self, step: int) -> float:
        warm, decay = min(1.0, (step + 1) / 200), 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * warm * (0.02 + 0.98 * decay)


@dataclass(frozen=True)
class Batch:
    noisy: torch.Tensor
    sigma: torch.Tensor
    scene: torch.Tensor
    target: torch.Tensor


def draw_batch(data: dict[str, torch.Tensor], recipe: Recipe, step: int) -> Batch:
    """The batch of one step, a function of (seed, step) alone; ``scene`` one past the last is the empty caption."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    pick = torch.randint(len(data["scene"]), (recipe.batch,), generator=generator)
    clean, scene = data["latents"][pick], data["scene"][pick]
    scene = torch.where(torch.rand(recipe.batch, generator=generator) < recipe.drop, len(SCENES), scene)
    # Stratified over the batch: the same distribution, less variance.
    uniform = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)) / recipe.batch
    sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
    noise = torch.randn(clean.shape, generator=generator)
    weight = sigma.view(-1, 1, 1, 1, 1)
    return Batch((1 - weight) * clean + weight * noise, sigma, scene, noise - clean)


def train(
    out: Path, data: dict[str, torch.Tensor], recipe: Recipe, compiled: bool = True, stop_at: int | None = None
) -> None:
    """From the last checkpoint in ``out`` to the recipe's last step, or to ``stop_at`` to go on later."""
    ids, masks = tokenize([scene.caption for scene in SCENES] + [""])
    torch.manual_seed(recipe.seed)
    model = TextToVelocity()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)
    both = torch.nn.ModuleList([model, ema])
    first, last, started = load_state(out, both, optimizer), stop_at or recipe.steps, time.time()
    if compiled:
        for block in model.transformer.blocks:
            block.compile()
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        batch = draw_batch(data, recipe, step)
        velocity = model(batch.noisy, batch.sigma, ids[batch.scene], masks[batch.scene])
        loss = F.mse_loss(velocity, batch.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        if step % 20 == 0:
            left = (time.time() - started) / (step - first + 1) * (last - step - 1)
            log_row(out / "curve.csv", {"step": step, "loss": loss.item(), "grad_norm": norm.item()})
            print(f"{step}/{last} loss {loss.item():.4f} norm {norm:.2f} left {left / 60:.1f} min", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == last:
            save_state(out, both, optimizer, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=Path, required=True, help="file of the latent space, made if it is not there")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--per-scene", type=int, default=40, help="videos drawn of each combination")
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps)
    data = draw_latents(load_or_fit(args.latents), args.per_scene, recipe.seed)
    train(args.out, data, recipe, compiled=not args.no_compile)


if __name__ == "__main__":
    main()
