"""The tools that made tiny-wan, a few steps of each, and that they resume where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tools.tiny_wan import export, latents, muon, train_transformer, train_vae
from wanquant.qat.state import weights_in
from wanquant.wan import tiny


def test_batches_depend_on_seed_and_step_alone() -> None:
    assert torch.equal(train_vae.batch(3, 0, 2, 5), train_vae.batch(3, 0, 2, 5))
    assert not torch.equal(train_vae.batch(3, 0, 2, 5), train_vae.batch(4, 0, 2, 5))
    assert train_vae.batch(0, 0, 2, 5).shape == (2, 3, 5, 64, 64)


def test_decode_unclamped_is_decode_where_nothing_saturates() -> None:
    vae = train_vae.new_vae().eval()
    z = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        plain = vae.decode(z).sample
        free = train_vae.decode_unclamped(vae, z)
    assert torch.equal(free.clamp(-1, 1), plain)


def test_no_held_out_scene_is_trained_on() -> None:
    assert len(latents.SCENES) == 180
    assert not any(scene.held_out for scene in latents.SCENES)


def test_captions_fit_the_text_length() -> None:
    ids, mask = train_transformer.tokenize([scene.caption for scene in tiny.all_scenes()] + [""])
    assert ids.shape == (217, train_transformer.TEXT_LENGTH)
    assert mask.sum(1).max() < train_transformer.TEXT_LENGTH
    assert mask[-1].sum() == 1


def same_weights(a: Path, b: Path) -> bool:
    first, second = (weights_in(folder) for folder in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_vae_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    phases, components = (train_vae.Phase(2, 1, 1, 1e-3), train_vae.Phase(1, 5, 1, 1e-3)), latents.fit(videos=4)
    train_vae.train(tmp_path / "whole", components, phases, 0)
    train_vae.train(tmp_path / "parts", components, phases, 0, stop_at=1)
    train_vae.train(tmp_path / "parts", components, phases, 0)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_latent_space_is_linear_and_keeps_its_proportions(tmp_path: Path) -> None:
    components = latents.load_or_fit(tmp_path / "latents.pt")
    again = latents.load_or_fit(tmp_path / "latents.pt")
    assert torch.equal(components.basis, again.basis)
    video = train_vae.batch(0, 5, 24, 17)
    z = components.encode(video)
    assert z.shape == (24, 16, 5, 8, 8)
    variance = z.var((0, 2, 3, 4))
    assert 0.7 < variance.mean() < 1.3
    assert (variance[:-1] > 0.7 * variance[1:]).all()
    assert variance[0] > 5 * variance[-1]
    error = (components.decode_patches(z) - latents.patches(video)) / 2
    assert 26 < -10 * error.square().mean().log10() < 31


def recipe(blocks: int = 2, steps: int = 3, **rest: Any) -> train_transformer.Recipe:
    rates = {"lr_matrices": 1e-2, "lr_vectors": 1e-2, "lr_rest": 2e-3}
    return train_transformer.Recipe(blocks, steps, **{"two_levels": 0.4, "batch": 2, **rates, **rest})


@pytest.mark.slow
def test_transformer_training_resumes_grows_and_exports(tmp_path: Path) -> None:
    components = latents.fit(videos=4)
    train_vae.train(tmp_path / "vae", components, (train_vae.Phase(1, 1, 2, 1e-3),), 0)
    data = train_transformer.draw_latents(components, latents.SCENES[:3], per_scene=2, seed=0)
    assert data["latents"].shape == (6, 16, 5, 8, 8)
    train_transformer.train(tmp_path / "whole", components, data, data, recipe(), compiled=False)
    train_transformer.train(tmp_path / "parts", components, data, data, recipe(), compiled=False, stop_at=2)
    train_transformer.train(tmp_path / "parts", components, data, data, recipe(), compiled=False)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    train_transformer.train(
        tmp_path / "grown", components, data, data, recipe(4, 1), tmp_path / "whole", compiled=False
    )
    export.assemble(tmp_path / "vae", tmp_path / "grown").save_pretrained(tmp_path / "model")
    pipe = WanPipeline.from_pretrained(tmp_path / "model")
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)
    assert len(pipe.transformer.blocks) == 4
    trained, shipped = (train_transformer.weights_in(tmp_path / name) for name in ("grown", "model"))
    assert trained.keys() == shipped.keys()
    assert all(torch.equal(trained[name].bfloat16().float(), shipped[name]) for name in trained)


@pytest.mark.slow
def test_averaged_weights_are_those_that_ship(tmp_path: Path) -> None:
    components = latents.fit(videos=4)
    data = train_transformer.draw_latents(components, latents.SCENES[:3], per_scene=2, seed=0)
    averaged = recipe(ema=0.5, of_ten=1)
    train_transformer.train(tmp_path / "whole", components, data, data, averaged, compiled=False)
    train_transformer.train(tmp_path / "parts", components, data, data, averaged, compiled=False, stop_at=2)
    assert not (tmp_path / "parts" / train_transformer.AVERAGED).exists()
    train_transformer.train(tmp_path / "parts", components, data, data, averaged, compiled=False)
    found = [train_transformer.weights_in(tmp_path / name) for name in ("whole", "parts")]
    raw = weights_in(tmp_path / "whole")
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], raw[name]) for name in raw)


@pytest.mark.slow
def test_scenes_drawn_side_by_side_are_the_same() -> None:
    components = latents.fit(videos=4)
    alone, beside = (
        train_transformer.draw_latents(components, latents.SCENES[:3], 2, seed=0, workers=workers) for workers in (1, 2)
    )
    assert torch.equal(alone["latents"], beside["latents"])
    assert torch.equal(alone["scene"], beside["scene"])


def clean_latents(batch: train_transformer.Batch) -> torch.Tensor:
    """What the noise was added to."""
    return batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * batch.target


def test_fresh_videos_are_new_and_repeatable() -> None:
    components = latents.fit(videos=4)
    data = train_transformer.draw_latents(components, latents.SCENES[:3], per_scene=2, seed=0)
    for fresh in (False, True):
        settings = recipe(fresh=fresh, two_levels=0.0)
        first, again, other = (
            clean_latents(train_transformer.draw_batch(components, data, settings, step)) for step in (1, 1, 2)
        )
        assert torch.equal(first, again)
        stored = [any(torch.allclose(c, known, atol=1e-4) for known in data["latents"]) for c in (*first, *other)]
        assert stored == [not fresh] * 4
        assert not fresh or not any(torch.allclose(a, b, atol=1e-4) for a in first for b in other)


def test_a_grown_model_computes_the_same() -> None:
    small, large = train_transformer.TextToVelocity(3), train_transformer.TextToVelocity(12)
    state = small.state_dict()
    large.load_state_dict(train_transformer.grow(state, 4))
    assert train_transformer.count_blocks(state) == 3
    ids, masks = train_transformer.tokenize(train_transformer.CAPTIONS[:2])
    with torch.no_grad():
        noisy = torch.randn(2, 16, 5, 8, 8)
        out = [model(noisy, torch.tensor([0.5, 0.9]), ids, masks) for model in (small, large)]
    assert len(large.transformer.blocks) == 12
    torch.testing.assert_close(*out)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 96), (2, 96, 32)])
def test_muon_orthogonalizes(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = muon.orthogonalize(matrices)
    values = torch.linalg.svdvals(made)
    # The smallest singular values of a square matrix take more than five iterations.
    assert values.max() < 1.3
    assert values.median() > 0.65
    assert (made * matrices).sum() > 0


def test_projections_pass_each_token_through_in_its_place() -> None:
    transformer = WanTransformer3DModel(**train_transformer.TRANSFORMER_CONFIG, num_layers=1)
    train_transformer.pass_through(transformer)
    latents_ = torch.randn(1, 16, 5, 8, 8)
    with torch.no_grad():
        hidden = transformer.patch_embedding(latents_)
        assert hidden.mean(1).abs().max() < 1e-5
        out = transformer.proj_out(hidden.flatten(2).transpose(1, 2))
    # As the model itself puts tokens back: [t, h, w, 1, 2, 2, channels].
    out = out.reshape(1, 5, 4, 4, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latents_.shape)
    torch.testing.assert_close(out, latents_ * (64 / 128) ** 0.5)


def test_two_noise_levels_become_one() -> None:
    components = latents.fit(videos=4)
    data = {"latents": torch.randn(4, 16, 5, 8, 8), "scene": torch.arange(4)}
    early, late = (
        train_transformer.draw_batch(components, data, recipe(steps=10, batch=8, two_levels=0.6), step)
        for step in (5, 6)
    )
    assert early.sigma.shape == (8, 80)
    assert max(row.unique().numel() for row in early.sigma) == 2
    assert late.sigma.shape == (8,)
    # Whatever the level, noise and clean latents are those of the target.
    weight = early.sigma.view(8, 5, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    clean = early.noisy - weight * early.target
    assert all(any(torch.allclose(c, known, atol=1e-5) for known in data["latents"]) for c in clean)
