from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from wanquant.evaluate.compare import REGISTERED, measure, register_metric
from wanquant.evaluate.fidelity import (
    EQUAL_DB,
    color_statistics,
    compare,
    error_flicker,
    latent_sqnr,
    motion_energy,
)
from wanquant.runs.reports.columns import FURTHER
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
    nothing = dict.fromkeys(("error_flicker", "motion_energy", "color_mean", "color_spread", "color_histogram"), 0.0)
    assert same == {"latent_sqnr": EQUAL_DB, "psnr": EQUAL_DB, "ssim": pytest.approx(1.0), **nothing}
    broken = compare(sample(video, latents), sample(video * math.nan, latents))
    assert all(math.isnan(broken[name]) for name in nothing)
    assert math.isnan(latent_sqnr(latents, latents * math.nan))
    assert math.isnan(latent_sqnr(latents, latents * math.inf))


def test_how_an_error_moves() -> None:
    rng = np.random.default_rng(0)
    reference, error = np.full((40, 16, 16, 3), 0.5), rng.normal(0, 0.01, (40, 16, 16, 3))
    assert error_flicker(reference, reference + error) == pytest.approx(1.0, abs=0.02)
    assert error_flicker(reference, reference + error[:1]) == pytest.approx(0.0, abs=1e-6)
    signs = np.array([1, -1] * 20)[:, None, None, None]
    assert error_flicker(reference, reference + signs * error[:1]) == pytest.approx(2.0, abs=1e-6)
    assert error_flicker(reference[:1], reference[:1] + 0.1) == 0.0


def test_motion_energy_in_decibels() -> None:
    moving = np.random.default_rng(0).random((5, 8, 8, 3))
    still = np.zeros((5, 8, 8, 3))
    assert motion_energy(moving, moving / 10) == pytest.approx(-20.0)
    assert motion_energy(moving / 10, moving) == pytest.approx(20.0)
    assert motion_energy(moving, still) == -EQUAL_DB
    assert motion_energy(still, moving) == EQUAL_DB
    assert motion_energy(still, still) == 0.0


def test_color_statistics_against_scipy() -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 200, (3, 16, 16, 3)) / 255
    video = np.clip(reference * [1.0, 1.1, 1.0] + [10 / 255, 0, 0], 0, 1)
    found = color_statistics(reference, video)
    assert found["color_mean"] == pytest.approx(max(10, 25.5 * reference[..., 1].mean()))
    assert found["color_spread"] == pytest.approx(25.5 * reference[..., 1].std())
    levels = [np.round(255 * v).reshape(-1, 3) for v in (reference, video)]
    apart = [wasserstein_distance(levels[0][:, c], levels[1][:, c]) for c in range(3)]
    assert found["color_histogram"] == pytest.approx(np.mean(apart))


def test_a_metric_of_ones_own_joins_the_others() -> None:
    """And is gone when it is taken out again."""
    rng = np.random.default_rng(0)
    video = rng.random((5, 16, 16, 3), np.float32)
    couple = Sample("p", 0, torch.ones(2, 2), video), Sample("p", 0, torch.ones(2, 2), video / 2)
    with pytest.raises(ValueError, match="a metric psnr already"):
        register_metric("psnr", lambda reference, sample: 0.0, "again")
    register_metric(
        "dimmer", lambda reference, sample: float(reference.video.max() / sample.video.max()), "dimmer", "x"
    )
    try:
        found = measure({"": [couple], "floor_ulp.": [(couple[0], couple[0])]}, scenes=False)
        assert FURTHER["dimmer"] == ("dimmer", "x")
        with pytest.raises(ValueError, match="a metric dimmer already"):
            register_metric("dimmer", lambda reference, sample: 0.0, "again")
    finally:
        del FURTHER["dimmer"]
        del REGISTERED["dimmer"]
    assert [item.value for item in found["dimmer"]] == [2.0]
    assert [item.value for item in found["floor_ulp.dimmer"]] == [1.0]
    assert "dimmer" not in measure({"": [couple]}, scenes=False)
