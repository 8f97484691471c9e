"""Planted outliers: another way to compute the same."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan_inputs, wan_transformer
from wanquant import load_pipeline
from wanquant.quant.statistics import Layout, Observer
from wanquant.wan import tiny
from wanquant.wan.checkpoints.find import read_generation
from wanquant.wan.config import GenerationConfig, OutliersConfig
from wanquant.wan.families import FOLDS
from wanquant.wan.generate import generate
from wanquant.wan.outliers import chosen_blocks, plant_outliers_


def test_the_function_is_the_same_bit_for_bit_on_tiny_wan() -> None:
    settings = GenerationConfig(**{**read_generation(tiny.folder()), "steps": 2, "num_frames": 5})
    pairs = [(scene.caption, 0) for scene in tiny.all_scenes()[::108]]
    pipe = load_pipeline("tiny", "cpu")
    before = generate(pipe, pairs, settings, decode=False)
    chosen = plant_outliers_(pipe.transformer, OutliersConfig(count=5, seed=3))
    assert len(set(chosen)) == 5
    after = generate(pipe, pairs, settings, decode=False)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(before, after, strict=True))


def test_tokens_spread_in_the_chosen_blocks_alone() -> None:
    model = wan_transformer(3)
    plant_outliers_(model, OutliersConfig(blocks=[-1], octaves=20))
    with Observer(model, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer, torch.no_grad():
        model(**wan_inputs())
    for name in FOLDS:
        spreads = []
        for index in range(3):
            channels = observer.statistics.site(f"blocks.{index}.{name}", "input").channel_square[0]
            spreads.append(channels.max() / channels[channels > 0].min())
        assert spreads[2] > 2**24  # of squares: 2^12 and more of magnitudes
        assert max(spreads[:2]) < 2**16


def test_blocks_come_by_list_or_by_seed() -> None:
    assert chosen_blocks(OutliersConfig(blocks=[0, -1]), 40) == (0, 39)
    assert chosen_blocks(OutliersConfig(count=5, seed=1), 40) == chosen_blocks(OutliersConfig(count=5, seed=1), 40)
    assert chosen_blocks(OutliersConfig(count=5, seed=1), 40) != chosen_blocks(OutliersConfig(count=5, seed=2), 40)
    for wrong in (OutliersConfig(blocks=[40]), OutliersConfig(count=41), OutliersConfig(blocks=[1], count=2)):
        with pytest.raises(ValueError, match=r"outliers|block"):
            chosen_blocks(wrong, 40)
