"""What a pipeline has made it does not make again, and a cut generation goes on at the batch it was cut in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import short, stopped_once
from wanquant import load_pipeline, quantize_
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig
from wanquant.runs.cache import Cache
from wanquant.wan import cached
from wanquant.wan.cached import LATENTS, CachedPipeline
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.generate import embed_prompt, generate
from wanquant.wan.load import Pipeline

SETTINGS = GenerationConfig(height=64, width=64, num_frames=17, steps=1, guidance_scale=2.0, max_text_length=64)
PAIRS = [("a cyan square moving left on a black background", seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load_pipeline(short(4), "cpu")


def cached_in(pipe: Pipeline, folder: Path, batch: int = 1) -> CachedPipeline:
    return CachedPipeline(pipe, ModelConfig(generation=SETTINGS, batch=batch), "f", torch.device("cpu"), Cache(folder))


def test_latents_are_those_of_a_generation_and_are_kept(pipe: Pipeline, tmp_path: Path) -> None:
    made, overflows = cached_in(pipe, tmp_path, batch=2).latents("x", PAIRS)
    expected = generate(pipe, PAIRS, SETTINGS, decode=False, batch=2)
    assert all(torch.equal(a, b.latents) for a, b in zip(made, expected, strict=True))
    assert overflows == Counter()
    again = cached_in(pipe, tmp_path, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(again.latents("x", PAIRS)[0], made, strict=True))
    assert again.reused == ["x"]
    # A further pair costs its own batch only; another model, noise or batch is another thing.
    signatures = {
        again.signature("latents", pairs=PAIRS[:2], **how) for how in ({}, {"perturbed": "1 ulp"}, {"quant": {}})
    }
    assert len(signatures) == 3
    assert len([path for path in (tmp_path / "latents").iterdir() if path.is_dir()]) == 2


def test_a_cut_generation_goes_on_where_it_was(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer quantized so that it overflows, which is counted whether a batch was made now or before."""
    quantized = load_pipeline(short(4), "cpu")
    direct = ActivationConfig("per_tensor", "direct")
    quantize_(quantized.transformer, QuantConfig(activations=direct, overflow="saturate"))
    for block in quantized.transformer.blocks[:2]:
        block.norm2.weight.data *= 1e7
    whole, counted = cached_in(quantized, tmp_path / "whole").latents("x", PAIRS, {"quant": "q"})
    assert sum(counted.values()) > 0
    calls: list[Any] = []
    monkeypatch.setattr(cached, "generate", stopped_once(cached.generate, 2, calls))
    with pytest.raises(KeyboardInterrupt):
        cached_in(quantized, tmp_path / "cut").latents("x", PAIRS, {"quant": "q"})
    found, overflows = cached_in(quantized, tmp_path / "cut").latents("x", PAIRS, {"quant": "q"})
    assert calls == [[PAIRS[0]], [PAIRS[1]], "cut", [PAIRS[2]]]
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert overflows == counted
    # A damaged batch is made again, and no other.
    file = sorted((tmp_path / "cut" / "latents").glob(f"*/{LATENTS}"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found, _ = cached_in(quantized, tmp_path / "cut").latents("x", PAIRS, {"quant": "q"})
    assert len(calls) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    cached_in(quantized, tmp_path / "cut").latents("x", PAIRS, {"quant": "q"}, afresh=True)
    assert len(calls) == 8


def test_a_prompt_is_embedded_once_for_all(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = PAIRS[0][0]
    first = cached_in(pipe, tmp_path).embedding(prompt)
    assert torch.equal(first, embed_prompt(pipe, prompt, SETTINGS)["prompt_embeds"].cpu())
    monkeypatch.setattr(cached, "embed_prompt", lambda *_: pytest.fail("embedded again"))
    assert torch.equal(cached_in(pipe, tmp_path).embedding(prompt), first)
