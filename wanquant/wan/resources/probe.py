"""How long the parts of a job take: each kind of work is run as it is where it is small, else scaled up from less."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn

from wanquant.quant.statistics import Layout, Observer
from wanquant.wan.config import GenerationConfig
from wanquant.wan.products import quick_products
from wanquant.wan.resources.empty import (
    IN_TIME,
    USUAL,
    Given,
    Quantized,
    block_inputs,
    empty_text_encoder,
    empty_transformer,
    empty_vae,
    fill,
    parameters_of,
)
from wanquant.wan.resources.footprint import mixed_norms, once, runs_on

P = ParamSpec("P")
R = TypeVar("R")

#: Tokens that a probe of time runs at most, of all rows together, and of attention alone.
PROBED, PROBED_ATTENTION = 2048, 1024
#: Seconds that a probe takes at least, once it is warm.
LONG_ENOUGH = 0.2
#: Latents that the VAE is probed with as they are, at most; else it is with these: (frames, rows, columns).
PROBED_LATENTS, SMALL_LATENTS = 512, (2, 8, 8)
#: Blocks times their width squared up to which so many of them are run: 40 blocks 256 wide.
SMALL_MODEL, SOME_BLOCKS = 40 * 256**2, 8
#: Latents of all rows together up to which what is outside of the blocks is run too.
PROBED_AROUND = 1 << 15
#: Parameters of a text encoder that is run to be timed, at most.
SMALL_ENCODER = 100_000_000
#: Median of a probe's repetitions over the quickest, above which something else is using the machine; and time the
#: process had a CPU, as a share of the time that passed, below which it does.
UNSTEADY, SHARE = 1.3, 0.9

#: Of the probes that a plan has used: whether something else used the machine meanwhile.
_disturbed: list[bool] = []


def probed(function: Callable[P, R]) -> Callable[P, R]:
    """Kept for the process, with whether it was disturbed: the jobs of a sweep ask for the same."""

    @once
    def probe(*given: P.args, **named: P.kwargs) -> tuple[R, bool]:
        before = len(_disturbed)
        found = function(*given, **named)
        return found, any(_disturbed[before:])

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        found, disturbed = probe(*given, **named)
        _disturbed.append(disturbed)
        return found

    return call


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
        found = _seconds(lambda: block(*given), device)
    if whole:
        return found
    count = min(tokens, PROBED_ATTENTION)
    size = (1, config["num_attention_heads"], count, config["attention_head_dim"])
    query = torch.full(size, 0.1, dtype=torch.bfloat16, device=device)
    each = _seconds(lambda: F.scaled_dot_product_attention(query, query, query), device) / count**2
    return rows * ((found - each * tokens_**2) / tokens_ * tokens + each * tokens**2)


def _watched(transformer: WanTransformer3DModel, layout: Layout | None) -> AbstractContextManager[Any]:
    return nullcontext() if layout is None else Observer(transformer, layout, lambda: (0, 0, 0))


def is_small(config: dict[str, Any], tokens: int, rows: int) -> bool:
    """Whether a pass is run as it is, with the scheduler's step, on some of the blocks."""
    weights = config["num_layers"] * (config["num_attention_heads"] * config["attention_head_dim"]) ** 2
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
) -> float:
    """Of a forward pass through a small transformer for one video, as if all blocks were ``how``, and observed if there
    is a ``layout``. Some blocks are run, and their time is scaled: a single one would stay in the CPU's cache."""
    blocks = min(config["num_layers"], SOME_BLOCKS)
    transformer = empty_transformer(config, runs_on(how, device), blocks)
    with _watched(transformer, layout):
        found = _pass_seconds(_filled(transformer, device), settings, rows, device, given)
    if blocks == config["num_layers"]:
        return found
    around: float = small_pass({**config, "num_layers": 0}, None, settings, rows, device, given=given)
    whole: float = around + (found - around) * config["num_layers"] / blocks
    return whole


def _pass_seconds(
    transformer: WanTransformer3DModel, settings: GenerationConfig, rows: int, device: torch.device, given: Given
) -> float:
    """Of a denoising step of so many videos, for one video and one pass."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    inputs = given.inputs(transformer.config, settings, rows, partial(torch.zeros, device=device))
    channels = transformer.config.out_channels
    latents = torch.zeros(rows, channels, *given.latents(settings), device=device)

    def step() -> None:
        scheduler.set_timesteps(settings.steps, device=device)
        for _ in range(settings.branches):
            noise = transformer(**inputs, return_dict=False)[0]
        scheduler.step(noise.float(), scheduler.timesteps[0], latents, return_dict=False)

    return _seconds(step, device) / (rows * settings.branches)


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
    transformer = _filled(empty_transformer(config, None, blocks=0), device)
    inputs = given.inputs(transformer.config, settings, rows, partial(torch.zeros, device=device))
    return _seconds(lambda: transformer(**inputs, return_dict=False), device)


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
        return _seconds(step, device) * rows * tokens / (rows_ * tokens_)


@probed
def decoding_seconds(folder: Path, settings: GenerationConfig, device: torch.device) -> float:
    """Of one video: as it is where it is small, else by a few frames of it, in proportion to the pixels."""
    vae = _filled(empty_vae(folder), device)
    whole = Given(vae.config.scale_factor_spatial).latents(settings)
    small = whole if math.prod(whole) <= PROBED_LATENTS else SMALL_LATENTS
    latents = torch.zeros(1, vae.config.z_dim, *small, device=device)
    found = _seconds(lambda: vae.decode(latents, return_dict=False), device)
    return found * _pixels(whole) / _pixels(small)


def _pixels(latents: tuple[int, int, int]) -> int:
    """Of what is decoded from them, over those of one of a latent's frames: its first frame gives one, others four."""
    return (IN_TIME * (latents[0] - 1) + 1) * latents[1] * latents[2]


@probed
def encoding_seconds(folder: Path, length: int, device: torch.device) -> float:
    """Of one prompt. A large encoder (5.7B parameters in Wan's) is not run for it, and counts nothing."""
    encoder = empty_text_encoder(folder)
    if parameters_of(encoder) > SMALL_ENCODER:
        return 0.0
    encoder = _filled(encoder.bfloat16(), device)
    return _seconds(lambda: encoder(torch.zeros(1, length, dtype=torch.long, device=device)), device)


def begin() -> None:
    """Of a plan: what other plans have used does not count."""
    _disturbed.clear()


def is_busy() -> bool:
    """Whether others use the machine, so that what was probed since ``begin`` is a guess: more threads want to run than
    this process has, or a probe was disturbed."""
    crowded = hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads() + 0.5
    return crowded or any(_disturbed)


@torch.no_grad()
def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, once it is warm."""
    taken: list[float] = []
    with quick_products(device):
        run()
        worked = time.process_time()
        while sum(taken) < LONG_ENOUGH:
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            taken.append(time.perf_counter() - begun)
        worked = time.process_time() - worked
    waited = device.type == "cpu" and worked < SHARE * sum(taken)
    _disturbed.append(waited or statistics.median(taken) / min(taken) > UNSTEADY)
    return sum(taken) / len(taken)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
