"""The tools that made tiny-wan, a few steps of each, and that they resume where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tools.tiny_wan import export, train_transformer, train_vae
from wanquant.wan import tiny


def test_batches_depend_on_seed_and_step_alone() -> None:
    assert torch.equal(train_vae.batch(3, 0, 2, 5), train_vae.batch(3, 0, 2, 5))
    assert not torch.equal(train_vae.batch(3, 0, 2, 5), train_vae.batch(4, 0, 2, 5))
    assert train_vae.batch(0, 0, 2, 5).shape == (2, 3, 5, 64, 64)


def test_decode_unclamped_is_decode_where_nothing_saturates() -> None:
    vae = train_vae.new_vae().eval()
    latents = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        plain = vae.decode(latents).sample
        free = train_vae.decode_unclamped(vae, latents)
    assert torch.equal(free.clamp(-1, 1), plain)


def test_no_held_out_scene_is_trained_on() -> None:
    assert len(train_vae.SCENES) == 180
    assert not any(scene.held_out for scene in train_vae.SCENES)


def test_captions_fit_the_text_length() -> None:
    ids, mask = train_transformer.tokenize([scene.caption for scene in tiny.all_scenes()] + [""])
    assert ids.shape == (217, train_transformer.TEXT_LENGTH)
    assert mask.sum(1).max() < train_transformer.TEXT_LENGTH
    assert mask[-1].sum() == 1


def same_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_vae_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    phases = (train_vae.Phase(2, 1, 2, 1e-3), train_vae.Phase(2, 5, 1, 1e-3, decoder_only=True))
    train_vae.train(tmp_path / "whole", phases, 2e-5, 0)
    train_vae.train(tmp_path / "parts", phases, 2e-5, 0, stop_at=3)
    train_vae.train(tmp_path / "parts", phases, 2e-5, 0)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_decoder_phase_leaves_the_encoder(tmp_path: Path) -> None:
    phases = (train_vae.Phase(1, 1, 2, 1e-3), train_vae.Phase(2, 1, 2, 1e-3, decoder_only=True))
    train_vae.train(tmp_path, phases, 2e-5, 0, stop_at=1)
    before = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    train_vae.train(tmp_path, phases, 2e-5, 0)
    after = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_transformer_training_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_transformer.TRANSFORMER_CONFIG, "num_layers", 2)
    monkeypatch.setattr(train_transformer, "SCENES", train_transformer.SCENES[:3])
    train_vae.train(tmp_path / "vae", (train_vae.Phase(1, 1, 2, 1e-3),), 2e-5, 0)
    data = train_transformer.encode_videos(tmp_path / "vae", tmp_path / "latents.pt", per_scene=2, seed=0)
    assert data["latents"].shape == (6, 16, 5, 8, 8)
    torch.testing.assert_close(data["latents"].mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    recipe = train_transformer.Recipe(steps=3, batch=2)
    train_transformer.train(tmp_path / "whole", data, recipe, compiled=False)
    train_transformer.train(tmp_path / "parts", data, recipe, compiled=False, stop_at=2)
    train_transformer.train(tmp_path / "parts", data, recipe, compiled=False)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    export.assemble(tmp_path / "vae", tmp_path / "whole").save_pretrained(tmp_path / "model")
    pipe = WanPipeline.from_pretrained(tmp_path / "model")
    assert pipe.vae.config.latents_mean == pytest.approx(data["mean"].tolist())
    assert len(pipe.transformer.blocks) == 2
