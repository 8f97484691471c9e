"""Generates videos for (prompt, seed) pairs, the same noise for every configuration and device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline as Pipeline
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image, ImageOps

from wanquant.quant.attention import TEXT
from wanquant.wan.checkpoints.checkpoint import read_json
from wanquant.wan.checkpoints.find import check_shape
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig, Picture
from wanquant.wan.experts import parts_of, shape_of_whole, transformers_in
from wanquant.wan.families import Text, family_of_pipe
from wanquant.wan.products import quick_products
from wanquant.wan.resources.placement import streamed

#: A prompt to what it is to the pipeline.
Embed = Callable[[str], Text]


def check_generation(model: ModelFiles, settings: GenerationConfig) -> None:
    """``ValueError`` for what the pipeline cannot do, though another could."""
    family, config = check_shape(model), parts_of(shape_of_whole(model))[0].config
    time, space = family.shrinks(read_json(model.folder / "vae" / "config.json"))
    sides = family.patch(config)[1:]
    for name, side in zip(("height", "width"), sides, strict=True):
        if getattr(settings, name) % (space * side):
            told = f"must be a multiple of {space * side}"
            raise ValueError(f"model.generation.{name}={getattr(settings, name)}: {told}")
    if (settings.num_frames - 1) % time:
        raise ValueError(f"model.generation.num_frames={settings.num_frames}: must be {time}n + 1")
    for name, known in (("guidance", (family.guidance,)), ("solver", family.solvers)):
        if getattr(settings, name) not in known:
            told = f"of a {family.pipeline.__name__} it is {' or '.join(known)}"
            raise ValueError(f"model.generation.{name}={getattr(settings, name)}: {told}")
    if getattr(config, "added_kv_proj_dim", None) is not None and settings.max_text_length != TEXT:
        told = f"must be {TEXT} for a transformer that attends to pictures"
        raise ValueError(f"model.generation.max_text_length={settings.max_text_length}: {told}")
    if settings.guidance == "embedded" and settings.negative_prompt:
        raise ValueError("model.generation.negative_prompt: a guidance scale that is an input has none, leave it out")
    if settings.guidance_scale_2 is not None and len(model.transformers) == 1:
        raise ValueError("model.generation.guidance_scale_2 is for pipelines of two transformers, and this has one")


@dataclass(frozen=True)
class Sample:
    """One generated video: its final latents, float32 [channels, frames', h, w], and pixels, float32
    [frames, height, width, 3] in 0..1."""

    prompt: str
    seed: int
    latents: torch.Tensor
    video: np.ndarray


@dataclass
class Position:
    """Where a generation is: index of the first video in the batch, denoising step, guidance branch (0 with the
    prompt, 1 without). Kept by ``generate`` for whoever watches."""

    video: int = 0
    step: int = -1
    branch: int = 0

    def where(self) -> tuple[int, int, int]:
        return self.video, self.step, self.branch

    @contextmanager
    def following(self, transformers: Iterable[torch.nn.Module], passes: int) -> Iterator[None]:
        """Counts their forward passes, of which a step has so many. Timesteps do not tell: two may be one in BF16."""
        seen = 0

        def hook(_: Any, args: Any) -> None:
            nonlocal seen
            self.step, self.branch = divmod(seen, passes)
            seen += 1

        self.step = -1
        handles = [each.register_forward_pre_hook(hook) for each in transformers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def initial_noise(pipe: Pipeline, seed: int, settings: GenerationConfig, further: int = 0) -> torch.Tensor:
    """float32 [1, channels, frames', h, w], drawn on the CPU whatever the device, so that all share it; with so many
    ``further`` frames of latents."""
    family, vae = family_of_pipe(pipe), pipe.vae.config
    frames, *sides = family.latents(vae, settings)
    shape = (1, family.channels(vae), frames + further, *sides)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def one_ulp_up(noise: torch.Tensor) -> torch.Tensor:
    """The smallest change there is, for the noise floor."""
    return torch.nextafter(noise, torch.full_like(noise, torch.inf))


@torch.no_grad()
def decode_video(pipe: Pipeline, latents: torch.Tensor) -> np.ndarray:
    """The video of one sample's final latents, bit for bit what the pipeline makes of them."""
    return family_of_pipe(pipe).decode(pipe, latents)


def _device(pipe: Pipeline) -> torch.device:
    """On which the pipeline runs, wherever weights wait: the VAE is always there."""
    device: torch.device = get_module_execution_device(pipe.vae)
    return device


def open_picture(picture: Picture, settings: GenerationConfig) -> Image.Image:
    """At the videos' size: the middle, scaled."""
    with Image.open(picture.path) as image:
        return ImageOps.fit(image.convert("RGB"), (settings.width, settings.height), Image.Resampling.BICUBIC)


@torch.no_grad()
def embed_prompt(pipe: Pipeline, prompt: str, settings: GenerationConfig) -> Text:
    """What one prompt is to the pipeline, encoded alone, so that its neighbours in a batch cannot change it."""
    with quick_products(_device(pipe)):
        return family_of_pipe(pipe).embed(pipe, prompt, settings)


@torch.no_grad()
def generate(
    pipe: Pipeline,
    pairs: Sequence[tuple[str, int]],
    settings: GenerationConfig,
    on_step: Callable[[], None] = lambda: None,
    perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
    decode: bool = True,
    batch: int = 1,
    position: Position | None = None,
    embed: Embed | None = None,
    pictures: Mapping[str, Picture] | None = None,
) -> list[Sample]:
    """One sample a (prompt, seed) pair.

    ``on_step`` is called after each denoising step of each batch; ``perturb`` may change the initial noise;
    without ``decode`` the videos are empty and the VAE is not run. A ``batch`` of several is quicker for a small
    model; matrix products of another size round otherwise, so compare only what was made in the same batches.
    ``embed`` may know the prompts' embeddings already; ``pictures`` are the first frames by prompt, where the pipeline
    takes one, and then videos come one at a time.
    """
    family = family_of_pipe(pipe)
    family.schedule(pipe, settings)
    further = family.picture_frames if pictures else 0
    embed = cache(partial(embed_prompt, pipe, settings=settings)) if embed is None else embed
    position = Position() if position is None else position
    samples = []
    for first in range(0, len(pairs), batch):
        prompts, seeds = zip(*pairs[first : first + batch], strict=True)
        position.video = first
        noise = torch.cat([initial_noise(pipe, seed, settings, further) for seed in seeds])
        noise = noise if perturb is None else perturb(noise)
        parts = transformers_in(pipe).values()
        with quick_products(_device(pipe)), streamed(parts), position.following(parts, settings.passes):
            shown = family.shown(open_picture(pictures[prompts[0]], settings)) if pictures else {}
            found = _denoise(pipe, prompts, noise, settings, embed, on_step, **shown)
        for prompt, seed, latents in zip(prompts, seeds, found, strict=True):
            video = decode_video(pipe, latents) if decode else np.empty((0, settings.height, settings.width, 3))
            samples.append(Sample(prompt, seed, latents, video))
    return samples


def _denoise(
    pipe: Pipeline,
    prompts: Sequence[str],
    noise: torch.Tensor,
    settings: GenerationConfig,
    embed: Embed,
    on_step: Callable[[], None],
    **given: Any,
) -> torch.Tensor:
    """Final latents, float32 [prompts, channels, frames', h, w], on the CPU."""

    def tick(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    family, device = family_of_pipe(pipe), _device(pipe)
    text = _stacked([embed(prompt) for prompt in prompts], device)
    negative: Text = {}
    if settings.guidance != "embedded":
        negative = _stacked([embed(settings.negative_prompt)] * len(prompts), device)
    found = family.denoise(pipe, text, negative, noise.to(device), settings, callback_on_step_end=tick, **given)
    return found.float().cpu()


def _stacked(texts: Sequence[Text], device: torch.device) -> Text:
    return {name: torch.stack([text[name] for text in texts]).to(device) for name in texts[0]}
