from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wanquant.evaluate.fidelity import EQUAL_DB, compare, latent_sqnr
from wanquant.wan.generate import Sample


def sample(video: np.ndarray, latents: torch.Tensor) -> Sample:
    return Sample("p", 0, latents, video.astype(np.float32))


def test_against_the_definitions() -> None:
    rng = np.random.default_rng(0)
    video, latents = rng.random((3, 32, 32, 3)), torch.randn(16, 2, 4, 4)
    other = video + 0.01
    found = compare(sample(video, latents), sample(other, latents * 0.9))
    assert found["psnr"] == pytest.approx(40.0, abs=1e-3)
    assert found["latent_sqnr"] == pytest.approx(20.0, abs=1e-4)
    assert 0.9 < found["ssim"] < 1.0


def test_equal_and_broken() -> None:
    video, latents = np.random.default_rng(0).random((3, 32, 32, 3)), torch.randn(16, 2, 4, 4)
    same = compare(sample(video, latents), sample(video, latents))
    assert same == {"latent_sqnr": EQUAL_DB, "psnr": EQUAL_DB, "ssim": pytest.approx(1.0)}
    assert math.isnan(latent_sqnr(latents, latents * math.nan))
    assert math.isnan(latent_sqnr(latents, latents * math.inf))
