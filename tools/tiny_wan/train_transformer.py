r"""Trains tiny-wan's transformer together with its text encoder, by flow matching.

x_sigma = (1 - sigma) x_0 + sigma e,  target v = e - x_0,  sigma = su / (1 + (s - 1) u) with u uniform:
the flow shift of generation, applied in training too (arXiv 2403.03206, section 5.3.2), with s = 3 or near it as
the recipes say. A tenth of the captions is dropped to the empty string, for classifier-free guidance. The text is
encoded just as ``WanPipeline`` does it, at the same length and with zeros behind the last token, because Wan's
cross-attention attends to the padding.

Left to itself a model of this size denoises every token alone for thousands of steps, and its shapes
are scattered tiles that do not move: with one noise level for a whole video, what a token could learn
from its neighbours is nearly as noisy as what it knows itself. Two things help:

- In the first part of the training videos have two noise levels ("diffusion forcing", arXiv 2407.01392; Wan 2.2's
  per-token timesteps carry it), split among their tokens or among their frames. Next to a clean token looking around
  pays at once, and between a clean frame and a noisy one lies a motion.
- Each head begins by looking at one neighbour (``look_around``).

There are two recipes. ``scratch``, of the tiny-wan that ships, trains all forty blocks from the first step, on a card:

    python -m tools.tiny_wan.train_transformer --device cuda \
        --latents outputs/tiny_wan/latents.pt --out outputs/tiny_wan/transformer

``grown``, of tiny-grown, needs two days on two CPU cores: it learns with ten blocks, at less than a third of the time a
step, then three silent blocks go behind each (``grow``), and the forty go on together, which leaves every fourth block
with most of the work. Its stages read latents of videos that were drawn and encoded once, 40 of each scene; in the end
the model knows those by heart (LOG.md), so the last stage draws new ones in every step.

Batches, noise and dropout are functions of (seed, step) alone, so a training that was killed goes on, with
``--resume``, with what an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from tools.tiny_wan.latents import SCENES, Components, load_or_fit, to_model
from tools.tiny_wan.muon import Muon
from wanquant.qat.config import LoopConfig
from wanquant.qat.loop import Hooks, Loop, Row, make_accelerator
from wanquant.qat.state import states_in
from wanquant.qat.state import weights_in as weights_of_loop
from wanquant.wan.tiny import Scene, all_scenes, draw

TEXT_LENGTH = 64
FLOW_SHIFT = 3.0
#: Videos of a scene that are drawn before they are encoded; the averaged weights, in a stage's folder.
DRAWN_TOGETHER, AVERAGED = 40, "averaged.safetensors"
VALIDATION_SIGMAS = (0.9, 0.8, 0.7, 0.5)
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
    "num_attention_heads": 8,
    # Of 32, rotary embedding would give 3 of 16 pairs a frequency that tells 4 positions apart; of 16, 3 of 8.
    "attention_head_dim": 16,
    "ffn_dim": 512,
    "text_dim": TEXT_CONFIG["d_model"],
    "in_channels": 16,
    "out_channels": 16,
}


#: (frames, rows, columns) of 2×2 latents to where each head looks in the beginning.
NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (2, 0, 0), (-2, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))

#: The last one is what dropped captions become.
CAPTIONS = [*(scene.caption for scene in all_scenes()), ""]


class TextToVelocity(torch.nn.Module):
    """Text encoder and transformer as one module with one checkpoint."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG, num_layers=blocks)
        pass_through(self.transformer)
        look_around(self.transformer)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``sigma`` is [batch], or [batch, tokens] for a noise level per token."""
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(noisy, 1000.0 * sigma, text, return_dict=False)[0]


@torch.no_grad()
def pass_through(transformer: WanTransformer3DModel) -> None:
    """Initializes input and output projection so that together they return each token at unit RMS.

    They are an embedding with orthonormal columns of zero mean, which the last layer norm leaves
    alone but for its length, and its transpose. Pure noise is then its own velocity from the start, but
    for what blocks and time embedding add.
    """
    weight = transformer.patch_embedding.weight
    width, inputs = weight.shape[0], weight[0].numel()
    basis = torch.randn(width, inputs)
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    embedding = basis.view(weight.shape)
    weight.copy_(embedding)
    transformer.patch_embedding.bias.zero_()
    # [width, channels, t, h, w] to the output's [t, h, w, channels, width].
    back = embedding.permute(2, 3, 4, 1, 0).reshape(inputs, width)
    transformer.proj_out.weight.copy_(back * math.sqrt(inputs / width))
    transformer.proj_out.bias.zero_()
    transformer.scale_shift_table.zero_()


@torch.no_grad()
def look_around(transformer: WanTransformer3DModel, content: float = 0.25, gain: float = 1.4) -> None:
    """Initializes self-attention so that each head looks towards one neighbour, of ``NEIGHBOURS``.

    Rotary embedding turns the first pair of each axis by one radian a position, so that constant queries
    and keys at an angle of ``-offset`` to each other score cos(distance - offset): highest at the neighbour.
    The constants are the biases. ``gain``, the weight of the norms behind them, makes attention sharp: for the
    sizes above the neighbour scores about 1.1 more, per axis, than the token beside it.
    """
    rope = transformer.rope
    pairs = torch.tensor([0, rope.t_dim, rope.t_dim + rope.h_dim])
    for block in transformer.blocks:
        attention = block.attn1
        query, key = (part.bias.zero_().view(attention.heads, -1) for part in (attention.to_q, attention.to_k))
        for head, offset in zip(range(attention.heads), NEIGHBOURS, strict=True):
            angle = torch.tensor(offset, dtype=torch.float32)
            key[head, pairs] = 1.0
            query[head, pairs], query[head, pairs + 1] = angle.cos(), angle.sin()
        attention.to_q.weight.mul_(content)
        attention.to_k.weight.mul_(content)
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.fill_(gain)


@torch.no_grad()
def grow(state: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """A ``TextToVelocity`` state that computes the same with ``times`` as many blocks.

    Behind every block stand copies of it whose three output projections are zero, so that they add nothing to
    the residual stream until they have learned to. (Copies that add a share each do not compute the same: a
    block's feed-forward part relies on what its attention has just added.)
    """
    grown = {}
    for name, tensor in state.items():
        place = re.fullmatch(r"transformer\.blocks\.(\d+)\.(.*)", name)
        if place is None:
            grown[name] = tensor
            continue
        silent = re.match(r"(attn[12]\.to_out\.0|ffn\.net\.2)\.", place[2])
        for copy in range(times):
            value = torch.zeros_like(tensor) if silent and copy else tensor.clone()
            grown[f"transformer.blocks.{int(place[1]) * times + copy}.{place[2]}"] = value
    return grown


def draw_latents(
    components: Components, scenes: list[Scene], per_scene: int, seed: int, workers: int = 1
) -> dict[str, torch.Tensor]:
    """Latents [videos, 16, 5, 8, 8] of freshly drawn videos, and the index of each one's scene in ``CAPTIONS``."""
    one = partial(_draw_scene, components, per_scene, seed)
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            latents = list(pool.map(one, scenes))
    else:
        latents = [one(scene) for scene in scenes]
    index = torch.tensor([CAPTIONS.index(scene.caption) for scene in scenes])
    return {"latents": torch.cat([torch.from_numpy(each) for each in latents]),
            "scene": index.repeat_interleave(per_scene)}  # fmt: skip


def _draw_scene(components: Components, count: int, seed: int, scene: Scene) -> np.ndarray:
    """A few at a time: pixels are a hundred times as large as latents."""
    rng = np.random.default_rng((seed, 1, CAPTIONS.index(scene.caption)))
    parts = [range(first, min(first + DRAWN_TOGETHER, count)) for first in range(0, count, DRAWN_TOGETHER)]
    encoded = [components.encode(torch.stack([to_model(draw(scene, rng)) for _ in part])) for part in parts]
    return np.asarray(torch.cat(encoded))


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    out = ByT5Tokenizer()(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


@dataclass(frozen=True)
class Recipe:
    """One stage of the training. ``drop`` is the share of captions replaced by the empty one; ``two_levels`` the first
    part of the steps, of which ``of_ten`` in ten have two noise levels; ``shift`` that of the noise levels: more of
    them are high. ``videos`` are drawn of each of the 180 combinations; ``fresh`` has every step draw its own. With
    ``ema`` the weights are averaged with that decay.

    Muon trains the matrices of the blocks, AdamW the rest: norms, biases and modulations of the blocks
    (``lr_vectors``) and what lies outside them.
    """

    blocks: int
    steps: int
    two_levels: float
    lr_matrices: float
    lr_vectors: float
    lr_rest: float
    shift: float = FLOW_SHIFT
    batch: int = 16
    drop: float = 0.1
    seed: int = 0
    fresh: bool = False
    of_ten: int = 10
    videos: int = 40
    warmup: int = 100
    floor: float = 0.02
    ema: float = 0.0
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """Of the learning rates: a short warm-up, then down to the floor by a cosine."""
        warm, decay = min(1.0, (step + 1) / self.warmup), 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return warm * (self.floor + (1 - self.floor) * decay)


SCRATCH = Recipe(
    blocks=40, steps=5776, two_levels=0.4, of_ten=6, batch=128, videos=320,
    lr_matrices=6e-3, lr_vectors=5e-3, lr_rest=1.5e-3, warmup=200, floor=0.01, ema=0.995, clip=2.0,
)  # fmt: skip
GROWN = (
    Recipe(blocks=10, steps=2400, two_levels=0.6, lr_matrices=1e-2, lr_vectors=1e-2, lr_rest=2e-3),
    Recipe(blocks=10, steps=2000, two_levels=0.0, lr_matrices=1e-2, lr_vectors=1e-2, lr_rest=2e-3, shift=4.0, seed=1),
    Recipe(blocks=40, steps=1000, two_levels=0.0, lr_matrices=5e-3, lr_vectors=5e-3, lr_rest=1e-3, shift=2.0, seed=2),
    Recipe(blocks=40, steps=700, two_levels=0.0, lr_matrices=5e-3, lr_vectors=5e-3, lr_rest=1e-3, seed=3),
    Recipe(blocks=40, steps=2800, two_levels=0.0, lr_matrices=4e-3, lr_vectors=4e-3, lr_rest=8e-4, seed=4),
    Recipe(blocks=40, steps=1700, two_levels=0.0, lr_matrices=2e-3, lr_vectors=2e-3, lr_rest=4e-4, seed=5, fresh=True),
)


@dataclass(frozen=True)
class Batch:
    """``sigma`` is [batch], or [batch, tokens] for a noise level per token."""

    noisy: torch.Tensor
    sigma: torch.Tensor
    scene: torch.Tensor
    target: torch.Tensor


def shift(uniform: torch.Tensor, by: float) -> torch.Tensor:
    return by * uniform / (1 + (by - 1) * uniform)


def noised(clean: torch.Tensor, sigma: torch.Tensor, scene: torch.Tensor, noise: torch.Tensor) -> Batch:
    """``sigma`` is [batch], or [batch, frames, rows, columns] of 2×2 latents each."""
    if sigma.ndim == 1:
        weight = sigma.view(-1, 1, 1, 1, 1)
    else:
        weight = sigma.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
        sigma = sigma.flatten(1)
    return Batch((1 - weight) * clean + weight * noise, sigma, scene, noise - clean)


def draw_fresh(components: Components, count: int, seed: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of ``count`` new videos of training scenes, and the index of each one's scene in ``CAPTIONS``."""
    rng = np.random.default_rng((seed[0], 3, seed[1]))
    scenes = [SCENES[i] for i in rng.integers(len(SCENES), size=count)]
    latents = components.encode(torch.stack([to_model(draw(scene, rng)) for scene in scenes]))
    return latents, torch.tensor([CAPTIONS.index(scene.caption) for scene in scenes])


def draw_batch(components: Components, data: dict[str, torch.Tensor], recipe: Recipe, step: int) -> Batch:
    """The batch of one step, a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    if recipe.fresh:
        clean, scene = draw_fresh(components, recipe.batch, (recipe.seed, step))
    else:
        pick = torch.randint(len(data["scene"]), (recipe.batch,), generator=generator)
        clean, scene = data["latents"][pick], data["scene"][pick]
    scene = torch.where(torch.rand(recipe.batch, generator=generator) < recipe.drop, len(CAPTIONS) - 1, scene)
    # Stratified over the batch: the same distribution, less variance.
    uniform = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)) / recipe.batch
    sigma = shift(uniform, recipe.shift)
    noise = torch.randn(clean.shape, generator=generator)
    if step < recipe.two_levels * recipe.steps and step % 10 < recipe.of_ten:
        second = torch.rand(recipe.batch, 1, 1, 1, generator=generator)
        share = torch.rand(recipe.batch, 1, 1, 1, generator=generator)
        tokens = (recipe.batch, clean.shape[2], clean.shape[3] // 2, clean.shape[4] // 2)
        by_token = torch.rand(tokens, generator=generator)
        by_frame = torch.rand(*tokens[:2], 1, 1, generator=generator)
        split = torch.where(torch.rand(recipe.batch, 1, 1, 1, generator=generator) < 0.5, by_frame, by_token)
        sigma = torch.where(split < share, second, sigma.view(-1, 1, 1, 1))
    return noised(clean, sigma, scene, noise)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The ``TextToVelocity`` state of a stage's folder, averaged if it was, or of a pipeline's, in float32."""
    if states_in(folder):
        state = load_file(folder / AVERAGED) if (folder / AVERAGED).is_file() else weights_of_loop(folder)
        # The encoder's own name for the embedding, which is tied.
        tied = ("text_encoder.shared.weight", "text_encoder.encoder.embed_tokens.weight")
        known = next(state[name] for name in tied if name in state)
        return {**state, **dict.fromkeys(tied, known)}
    parts = {
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
    }
    return {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}


def count_blocks(state: dict[str, torch.Tensor]) -> int:
    return len({name.split(".")[2] for name in state if name.startswith("transformer.blocks.")})


def make_optimizers(model: TextToVelocity, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, vectors, rest = [], [], []
    for name, parameter in model.named_parameters():
        in_block = "blocks." in name or ("encoder.block" in name and "relative" not in name)
        kind = rest if not in_block else matrices if parameter.ndim == 2 else vectors
        kind.append(parameter)
    groups = [{"params": vectors, "lr": recipe.lr_vectors}, {"params": rest, "lr": recipe.lr_rest}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    return [Muon(matrices, lr=recipe.lr_matrices), adam]


@torch.no_grad()
def validate(model: TextToVelocity, held_out: dict[str, torch.Tensor], texts: tuple[torch.Tensor, torch.Tensor]) -> Row:
    """The loss on held-out combinations at a few noise levels, each one for whole videos."""
    noise = torch.randn(held_out["latents"].shape, generator=torch.Generator().manual_seed(1))
    scene = held_out["scene"]
    levels = {sigma: torch.full((len(scene),), sigma) for sigma in VALIDATION_SIGMAS}
    batches = {sigma: noised(held_out["latents"], level, scene, noise) for sigma, level in levels.items()}
    return {f"loss_{sigma}": flow_loss(model, batch, texts).item() for sigma, batch in batches.items()}


def flow_loss(model: torch.nn.Module, batch: Batch, texts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """On the model's device; ``texts`` are the tokens of ``CAPTIONS`` and their mask."""
    given = (batch.noisy, batch.sigma, *(each[batch.scene] for each in texts), batch.target)
    device = next(model.parameters()).device
    *inputs, target = (each.to(device) for each in given)
    return F.mse_loss(model(*inputs), target)


def train(
    out: Path,
    components: Components,
    data: dict[str, torch.Tensor],
    held_out: dict[str, torch.Tensor],
    recipe: Recipe,
    before: Path | None = None,
    compiled: bool = True,
    stop_at: int | None = None,
    device: str = "cpu",
) -> None:
    """From the last checkpoint in ``out`` to the recipe's last step, or to ``stop_at`` to go on later.

    It begins with new weights, or with those ``before`` (the folder of a stage or of a pipeline), grown to as many
    blocks as the recipe says.
    """
    texts = tokenize(CAPTIONS)
    torch.manual_seed(recipe.seed)
    model = TextToVelocity(recipe.blocks)
    if before is not None:
        smaller = weights_in(before)
        model.load_state_dict(grow(smaller, recipe.blocks // count_blocks(smaller)))
    if compiled:
        for block in model.transformer.blocks:
            block.compile()

    def loss(model: torch.nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
        return {"loss": flow_loss(model, draw_batch(components, data, recipe, step), texts)}

    def check(step: int) -> Row:
        return validate(model, held_out, texts)

    # A "row" is a whole batch: it is drawn as one, for one process.
    how = {"save_every": 200, "seed": recipe.seed, "diverged": math.inf, "ema": recipe.ema, "clip": recipe.clip}
    config = LoopConfig(recipe.steps, batch=1, **how)
    accelerator, optimizers = make_accelerator(torch.device(device)), make_optimizers(model, recipe)
    loop = Loop(accelerator, model, optimizers, recipe.rate_at, loss, config, out, str(recipe))
    loop.run("train transformer", Hooks(check=check, check_every=200, show=show), stop_at)
    if loop.average is not None and loop.done == recipe.steps:
        loop.average.settle()
        save_averaged(loop.release(), out)
    else:
        loop.release()


def save_averaged(model: torch.nn.Module, out: Path) -> None:
    """Of tied weights one, and the names of blocks without what compiling adds."""
    state = {name.replace("_orig_mod.", ""): tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("text_encoder.encoder.embed_tokens.weight")
    save_file(state, out / AVERAGED)


def show(row: Row) -> None:
    """What was seen on held-out videos; the rest is in the progress line, and in the state's ``loop.json``."""
    if any(name.startswith("loss_") for name in row):
        print(" ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=Path, required=True, help="file of the latent space, made if it is not there")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=("scratch", "grown"), default="scratch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    parser.add_argument("--first-stage", type=int, default=0, help="of grown, from 0: begin with this one")
    parser.add_argument("--weights", type=Path, help="begin with these, a stage's or a pipeline's folder")
    parser.add_argument("--no-compile", action="store_true", help="slower, but needs no C++ compiler")
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no card")
        torch.set_float32_matmul_precision("high")
    stages = {f"stage{number}": recipe for number, recipe in enumerate(GROWN)}
    stages = {"scratch": SCRATCH} if args.recipe == "scratch" else dict(list(stages.items())[args.first_stage :])
    begun = [name for name in stages if states_in(args.out / name)]
    if begun and not args.resume:
        parser.error(f"{args.out / begun[-1]} holds a training: go on with --resume, or give another --out")
    before = args.weights
    if before is None and args.first_stage:
        before = args.out / f"stage{args.first_stage - 1}"
        if not states_in(before):
            parser.error(f"stage {args.first_stage} goes on from another: {before} has no state, give --weights")
    components, videos = load_or_fit(args.latents), next(iter(stages.values())).videos
    data = draw_latents(components, SCENES, videos, seed=0, workers=min(16, os.cpu_count() or 1))
    held_out = draw_latents(components, [scene for scene in all_scenes() if scene.held_out], 2, seed=1)
    how = {"compiled": not args.no_compile, "device": args.device}
    for name, recipe in stages.items():
        train(args.out / name, components, data, held_out, recipe, before, **how)
        before = args.out / name


if __name__ == "__main__":
    main()
