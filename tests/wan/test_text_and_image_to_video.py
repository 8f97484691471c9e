"""Wan2.2-TI2V: a timestep for each token, and a VAE of 16x16x4; from text, and from a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.jobs import TWO, ptq
from tests.qat.short import overrides, train
from tests.test_config import composed
from tests.wan.variants import first_frame, text_and_image_to_video
from wanquant import load_pipeline, quantize_
from wanquant.evaluate.single_steps import measured_now, record
from wanquant.ptq.estimate import count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.quant import QuantConfig
from wanquant.runs.cache import Cache
from wanquant.runs.files import sum_of_file
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import GenerationConfig, ModelConfig, Picture
from wanquant.wan.generate import Position, generate, initial_noise
from wanquant.wan.resources.empty import Given
from wanquant.wan.resources.footprint import denoising_bytes

CPU = torch.device("cpu")
TEXT = "a red circle moving right on a black background"
SETTINGS = GenerationConfig(64, 96, 9, 2, 2.0, 3.0, 64, 8)
SIZE = [f"model.generation.{name}={size}" for name, size in (("height", 64), ("width", 96), ("num_frames", 5))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_and_image_to_video(tmp_path_factory.mktemp("model") / "ti2v")


def test_a_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"model.path={model}", "tracker=none", "protect=ends", f"cache={tmp_path / 'cache'}", *SIZE]
    steps = ["model.generation.steps=2", TWO, f"hydra.run.dir={tmp_path / 'run'}"]
    assert ptq(monkeypatch, *words, *steps) == 0
    result = read_result(tmp_path / "run")
    assert result["conversion"]["converted"] == 10
    assert result["metrics"]["step_sqnr"]["mean"] < 100
    pipe = load_pipeline(tmp_path / "run" / "checkpoint", "cpu")
    assert pipe.config.expand_timesteps
    assert len(quantized_linears(pipe.transformer)) == 10
    assert pipe.vae.config.z_dim == 48


def test_noise_and_videos_have_the_vaes_size(model: Path) -> None:
    pipe = load_pipeline(model, "cpu")
    assert initial_noise(pipe, 0, SETTINGS).shape == (1, 48, 3, 4, 6)
    (sample,) = generate(pipe, [(TEXT, 0)], SETTINGS)
    assert sample.video.shape == (9, 64, 96, 3)
    assert sample.latents.shape == (48, 3, 4, 6)


@pytest.mark.parametrize("picture", [False, True])
def test_single_steps_are_replayed_with_every_tokens_timestep(picture: bool, tmp_path: Path) -> None:
    """Bit for bit; a given first frame's tokens have none, and the steps are counted all the same."""
    pipe = load_pipeline(text_and_image_to_video(tmp_path / "model", picture), "cpu")
    shown = first_frame(tmp_path, TEXT)
    pictures = {TEXT: Picture(shown, sum_of_file(shown))} if picture else {}
    config = ModelConfig(generation=SETTINGS)
    pipeline = CachedPipeline(pipe, config, "ti2v", CPU, Cache(tmp_path / "cache"), pictures)
    (along,) = record(pipeline, [(TEXT, 0)], 2, alone=True)
    sample = along.recording[0]
    assert sample.timestep.shape == (3 * 2 * 3,)
    assert (sample.timestep[:6] == 0).all() == picture
    first, second = along.recording.timesteps()
    assert first > second > 0
    assert (measured_now(along, lambda: None).decibels == 100.0).all()
    position = Position()
    pipeline.generate([(TEXT, 0)], lambda: None, decode=False, position=position)
    assert (position.step, position.branch) == (1, 1)
    quantize_(pipe.transformer, QuantConfig(), [0])
    assert (measured_now(along, lambda: None).decibels < 100.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blockwise", "all"])
def test_it_is_trained_on_its_own_trajectories(
    scope: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [w for w in overrides(model, tmp_path / "cache", f"qat.scope={scope}") if not w.startswith(tuple(SIZE))]
    assert train(monkeypatch, *words, *SIZE, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert read_result(tmp_path / "run")["status"] == "ok"


def test_a_size_that_its_patches_do_not_fill_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.path={model}", "tracker=none", f"hydra.run.dir={tmp_path / 'run'}", "model.generation.height=48"]
    assert ptq(monkeypatch, *words) == 1
    assert "model.generation.height=48: must be a multiple of 32" in capsys.readouterr().err


def test_it_is_planned_at_the_true_shape() -> None:
    """Five billion parameters in 30 blocks; modulation for each token is counted."""
    texts = ["prompts.texts=[one]", "calib.texts=[other]", "eval.videos=false", "model.device=cpu"]
    plan = resolve(composed("model=wan2.2-ti2v-5b", *texts))
    estimate = estimate_resources(plan, count_videos(plan))
    assert estimate.given == Given(16, True)
    assert estimate.given.latents(plan.settings) == (31, 44, 80)
    assert len(estimate.converted) == 10 * 25
    assert plan.model.protected == (0, 1, 27, 28, 29)
    assert estimate.parameters == pytest.approx(5.0e9, rel=1e-3)
    usual = denoising_bytes(dict(plan.model.shape.config), None, plan.settings, 1, CPU, Given(16))
    assert estimate.activations > usual + 4 * 6 * 3072 * 31 * 22 * 40
