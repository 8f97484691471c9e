"""How long the parts of a job take: each kind of work is run as it is where it is small, else scaled up from less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn

from wanquant.quant.statistics import Layout, Observer
from wanquant.wan.config import GenerationConfig
from wanquant.wan.experts import as_whole
from wanquant.wan.families import WAN, Family
from wanquant.wan.resources.empty import (
    USUAL,
    Given,
    Quantized,
    block_inputs,
    empty_encoder,
    empty_transformer,
    empty_vae,
    fill,
    parameters_of,
    tokens_of,
)
from wanquant.wan.resources.footprint import mixed_norms, runs_on
from wanquant.wan.resources.timing import measured, probed

#: Tokens that a probe of time runs at most, of all rows together, and of attention alone.
PROBED, PROBED_ATTENTION = 2048, 1024
#: Latents that the VAE is probed with as they are, at most; else it is with these: (frames, rows, columns).
PROBED_LATENTS, SMALL_LATENTS = 512, (2, 8, 8)
#: Blocks times their width squared up to which so many of them are run: 40 blocks 256 wide.
SMALL_MODEL, SOME_BLOCKS = 40 * 256**2, 8
#: Latents of all rows together up to which what is outside of the blocks is run too.
PROBED_AROUND = 1 << 15
#: Parameters of a text encoder that is run to be timed, at most.
SMALL_ENCODER = 100_000_000


@probed
def block_seconds(
    config: dict[str, Any],
    how: Quantized | None,
    tokens: int,
    text: int,
    rows: int,
    device: torch.device,
    layout: Layout | None = None,
) -> float:
    """Of one block on ``rows`` videos of so many tokens each, observed as in calibration if there is a ``layout``: run
    as it is where it is small; else few tokens are run, and their time is scaled, attention's by the square."""
    transformer = empty_transformer(config, runs_on(how, device), blocks=1)
    block = _filled(transformer, device).blocks[0]
    whole = rows * tokens <= PROBED
    rows_, tokens_ = (rows, tokens) if whole else (1, min(tokens, PROBED // 4))
    given = block_inputs(transformer, rows_, tokens_, text, torch.bfloat16, device)
    with _watched(transformer, layout):
        found = measured(lambda: block(*given), device)
    if whole:
        return found
    each = attention_seconds(config, min(tokens, PROBED_ATTENTION), device)
    return rows * ((found - each * tokens_**2) / tokens_ * tokens + each * tokens**2)


def attention_seconds(config: dict[str, Any], tokens: int, device: torch.device) -> float:
    """Of a pair of tokens."""
    size = (1, config["num_attention_heads"], tokens, config["attention_head_dim"])
    query = torch.full(size, 0.1, dtype=torch.bfloat16, device=device)
    return measured(lambda: F.scaled_dot_product_attention(query, query, query), device) / tokens**2


def _watched(transformer: WanTransformer3DModel, layout: Layout | None) -> AbstractContextManager[Any]:
    return nullcontext() if layout is None else Observer(as_whole(transformer), layout, lambda: (0, 0, 0))


@probed
def other_blocks_seconds(
    config: dict[str, Any],
    how: Quantized | None,
    settings: GenerationConfig,
    rows: int,
    device: torch.device,
    given: Given,
    layout: Layout | None = None,
) -> float:
    """Of all blocks of a pass on ``rows`` videos, whatever they are called with: by what a pass of a small video takes
    more with a block than without, scaled as ``block_seconds`` does it."""
    family, small = given.family, settings
    while math.prod(given.latents(small)) > PROBED and max(small.height, small.width) >= 8 * given.in_space:
        small = replace(small, height=_half(small.height, given), width=_half(small.width, given), num_frames=1)
    lists, taken = len(family.block_lists), list[float]()
    for filled_lists in range(lists + 1):  # a block in one more, from the last on
        blocks = [0] * (lists - filled_lists) + [1] * filled_lists
        transformer = empty_transformer(config, runs_on(how, device), blocks, family)
        inputs = given.inputs(config, small, 1, partial(torch.ones, device=device))
        with _watched(transformer, layout):
            filled = _filled(transformer, device)
            taken.append(measured(lambda: filled(**inputs, return_dict=False), device))  # noqa: B023
    count, tokens = (tokens_of(each, transformer, given) for each in (small, settings))
    each = settings.together * attention_seconds(config, min(tokens, PROBED_ATTENTION), device)
    found = 0.0
    for number, (less, more) in zip(reversed(family.lengths(config)), itertools.pairwise(taken), strict=True):
        alone = max(more - less, 0.0)
        found += number * (max(alone - each * count**2, 0.0) / count * tokens + each * tokens**2)
    return rows * found


def _half(side: int, given: Given) -> int:
    """Rounded to what the family takes."""
    step = 4 * given.in_space
    return max(side // 2 // step, 1) * step


def is_small(config: dict[str, Any], tokens: int, rows: int, family: Family = WAN) -> bool:
    """Whether a pass is run as it is, with the scheduler's step, on some of the blocks."""
    weights = sum(family.lengths(config)) * (config["num_attention_heads"] * config["attention_head_dim"]) ** 2
    return weights <= SMALL_MODEL and rows * tokens <= PROBED


@probed
def small_pass(
    config: dict[str, Any],
    how: Quantized | None,
    settings: GenerationConfig,
    rows: int,
    device: torch.device,
    layout: Layout | None = None,
    given: Given = USUAL,
    alone: bool = False,
) -> float:
    """Of a forward pass through a small transformer for one video, as if all blocks were ``how``, and observed if there
    is a ``layout``; or ``alone``, of what is outside of the blocks. Some blocks are run, and their time is scaled: a
    single one would stay in the CPU's cache."""
    family = given.family
    lengths = family.lengths(config)
    some = [0 if alone else min(length, SOME_BLOCKS) for length in lengths]
    transformer = empty_transformer(config, runs_on(how, device), some, family)
    with _watched(transformer, layout):
        found = _pass_seconds(_filled(transformer, device), settings, rows, device, given)
    if alone or some == lengths:
        return found
    around: float = small_pass(config, None, settings, rows, device, given=given, alone=True)
    whole: float = around + (found - around) * sum(lengths) / sum(some)
    return whole


def _pass_seconds(transformer: Any, settings: GenerationConfig, rows: int, device: torch.device, given: Given) -> float:
    """Of a denoising step of so many videos, for one video and one pass."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    inputs = given.inputs(transformer.config, settings, rows, partial(torch.zeros, device=device))

    def step() -> None:
        scheduler.set_timesteps(settings.steps, device=device)
        for _ in range(settings.passes):
            noise = transformer(**inputs, return_dict=False)[0]
        scheduler.step(noise.float(), scheduler.timesteps[0], torch.zeros_like(noise).float(), return_dict=False)

    return measured(step, device) / (rows * settings.passes)


def _filled(model: Any, device: torch.device) -> Any:
    fill(model, lambda size, dtype: torch.full(size, 0.01 if dtype.is_floating_point else 8, dtype=dtype))
    return model.to(device)


@probed
def around_seconds(
    config: dict[str, Any], settings: GenerationConfig, rows: int, device: torch.device, given: Given = USUAL
) -> float:
    """Of a forward pass, what is outside of the blocks; nothing where they are so large that it does not count."""
    if rows * math.prod(given.latents(settings)) > PROBED_AROUND:
        return 0.0
    transformer = _filled(empty_transformer(config, None, 0, given.family), device)
    inputs = given.inputs(transformer.config, settings, rows, partial(torch.zeros, device=device))
    return measured(lambda: transformer(**inputs, return_dict=False), device)


def learning_seconds(
    config: dict[str, Any],
    prepare: Callable[[nn.Module], None],
    tokens: int,
    text: int,
    rows: int,
    device: torch.device,
    precision: str,
) -> float:
    """Of one block forward, backward and through AdamW, as ``prepare`` makes it trainable, on ``rows`` videos; in
    proportion to the tokens where they are many."""
    transformer = empty_transformer(config, None, blocks=1).train()
    fill(transformer, partial(torch.full, fill_value=0.01), narrow=False)
    prepare(transformer)
    block = transformer.blocks[0].to(device).requires_grad_(True)
    rows_, tokens_ = (rows, tokens) if rows * tokens <= PROBED else (1, PROBED)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    given = block_inputs(transformer, rows_, tokens_, text, kind, device)
    optimizer = torch.optim.AdamW(block.parameters(), 1e-6)

    def step() -> None:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            block(*given).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with mixed_norms():
        return measured(step, device) * rows * tokens / (rows_ * tokens_)


@probed
def decoding_seconds(folder: Path, settings: GenerationConfig, device: torch.device, family: Family = WAN) -> float:
    """Of one video: as it is where it is small, else by a few frames of it, in proportion to the pixels."""
    vae = _filled(empty_vae(folder, family), device)
    whole = family.latents(vae.config, settings)
    small = whole if math.prod(whole) <= PROBED_LATENTS else SMALL_LATENTS
    latents = torch.zeros(1, family.channels(vae.config), *small, device=device)
    found = measured(lambda: vae.decode(latents, return_dict=False), device)
    in_time = family.shrinks(vae.config)[0]
    return found * _pixels(whole, in_time) / _pixels(small, in_time)


def _pixels(latents: tuple[int, int, int], in_time: int) -> int:
    """Of what is decoded from them, over those of one of a latent's frames: its first frame gives one, others more."""
    return (in_time * (latents[0] - 1) + 1) * latents[1] * latents[2]


@probed
def encoding_seconds(folder: Path, kind: Any, length: int, device: torch.device) -> float:
    """Of one prompt. A large encoder (5.7B parameters in Wan's) is not run for it, and counts nothing."""
    encoder = empty_encoder(folder, kind)
    if parameters_of(encoder) > SMALL_ENCODER:
        return 0.0
    longest: int = getattr(encoder.config, "max_position_embeddings", length)
    length = min(length, longest)  # of CLIP 77, to which prompts are cut
    encoder = _filled(encoder.bfloat16(), device)
    return measured(lambda: encoder(torch.zeros(1, length, dtype=torch.long, device=device)), device)
