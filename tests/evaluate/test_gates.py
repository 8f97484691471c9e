"""Each gate on a video made to fail it, and all of them on good ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wanquant.evaluate.gates import check
from wanquant.wan.generate import Sample
from wanquant.wan.tiny import all_scenes, draw

GOOD = draw(all_scenes()[7], np.random.default_rng(0)).astype(np.float32) / 255


def sample(video: np.ndarray, latents: torch.Tensor | None = None) -> Sample:
    return Sample("p", 0, torch.zeros(2, 3) if latents is None else latents, video.astype(np.float32))


def failed(video: np.ndarray, reference: np.ndarray = GOOD) -> set[str]:
    good = sample(reference)
    return {gate.name for gate in check([good, sample(video)], [good, good]) if not gate.passed}


def test_quiet_on_good_videos() -> None:
    rng = np.random.default_rng(1)
    assert failed(GOOD) == set()
    assert failed(np.clip(GOOD + rng.normal(0, 0.02, GOOD.shape), 0, 1)) == set()
    for scene in all_scenes()[::31]:
        video = draw(scene, rng).astype(np.float32) / 255
        assert failed(video * 0.97, video) == set()


COLLAPSED = {
    "black": np.zeros_like(GOOD),
    "constant": np.full_like(GOOD, GOOD.mean()),
    "noise": np.random.default_rng(0).random(GOOD.shape),
    "static": np.repeat(GOOD[:1], len(GOOD), 0),
    "finite": np.where(np.arange(GOOD.size).reshape(GOOD.shape) == 5, np.nan, GOOD),
}


@pytest.mark.parametrize(
    ("gate", "video"),
    [
        *COLLAPSED.items(),
        ("color_shift", np.clip(GOOD + np.array([0.4, 0, 0]), 0, 1)),
    ],
)
def test_each_fails_what_it_is_for(gate: str, video: np.ndarray) -> None:
    found = failed(video)
    assert gate in found
    assert not any(name.startswith("bf16.") for name in found)


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.08, 0.3])
def test_faint_noise_is_noise(sigma: float) -> None:
    rng = np.random.default_rng(2)
    for scene in all_scenes()[::31]:
        video = draw(scene, rng).astype(np.float32) / 255
        noise = np.clip(video.mean((0, 1, 2)) + rng.normal(0, sigma, video.shape), 0, 1)
        assert "noise" in failed(noise, video)


@pytest.mark.parametrize("gate", COLLAPSED)
def test_a_collapsed_reference_is_no_excuse(gate: str) -> None:
    assert f"bf16.{gate}" in failed(COLLAPSED[gate], COLLAPSED[gate])


def test_an_infinity_in_the_latents_is_seen() -> None:
    gates = check([sample(GOOD, torch.tensor([1.0, torch.inf]))], [sample(GOOD)])
    assert [gate.name for gate in gates if not gate.passed] == ["finite"]


def test_the_worst_item_is_named() -> None:
    gates = {gate.name: gate for gate in check([sample(GOOD), sample(0 * GOOD)], [sample(GOOD), sample(GOOD)])}
    assert gates["black"].worst == 1
    assert gates["black"].figures[1] == gates["black"].as_json()["figure"] == 0.0
