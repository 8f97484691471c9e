"""Models distilled to a few steps without guidance: one branch, their own noise levels, Euler's method."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests.jobs import ptq, short
from tests.test_config import composed
from wanquant import load_pipeline
from wanquant.evaluate.single_steps import record
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.estimate import count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse
from wanquant.quant.statistics import load_statistics
from wanquant.runs.cache import Cache
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.generate import embed_prompt, generate, initial_noise

#: 1, 0.75, 0.5 and 0.25 of the way to noise, shifted by 5.
SIGMAS = [1.0, 0.9375, 5 / 6, 0.625]
PAIRS = [("a red circle moving right on a black background", 0)]


def preset() -> GenerationConfig:
    """As it ships, for videos of tiny-wan's size."""
    generation = composed("model=wan2.1-t2v-14b-4step").model.generation
    return dataclasses.replace(generation, height=64, width=64, num_frames=5, max_text_length=64, negative_prompt="")


def test_each_step_is_one_of_eulers() -> None:
    pipe, settings = load_pipeline(short(2), "cpu"), preset()
    found = generate(pipe, PAIRS, settings, decode=False)[0].latents
    sigmas = pipe.scheduler.sigmas
    assert sigmas.tolist() == pytest.approx([*SIGMAS, 0.0], abs=1e-3)
    latents = initial_noise(pipe, 0, settings)
    text = embed_prompt(pipe, PAIRS[0][0], settings)["prompt_embeds"][None].bfloat16()
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            timestep = (1000 * now).long()[None]
            velocity = pipe.transformer(latents.bfloat16(), timestep, text, return_dict=False)[0]
            latents = latents + (after - now) * velocity.float()
    torch.testing.assert_close(found, latents[0], atol=2e-2, rtol=2e-2)  # velocities are in BF16, and taken again
    other = generate(pipe, PAIRS, dataclasses.replace(settings, solver="unipc", flow_shift=3.0), decode=False)
    assert (other[0].latents - found).norm() > 10 * (latents[0] - found).norm()


def test_calibration_and_single_steps_see_one_branch(tmp_path: Path) -> None:
    """Of four steps, at these noise levels."""
    model = ModelConfig(generation=preset())
    pipeline = CachedPipeline(load_pipeline(short(2), "cpu"), model, "short", torch.device("cpu"), Cache(tmp_path))
    calibrator = Calibrator(pipeline, parse(QuantConfig()), PAIRS, bins=4)
    statistics = load_statistics(calibrator.statistics_files(full=False)[0].parent)
    assert (statistics.layout.steps, statistics.layout.branches) == (4, 1)
    tokens, name = 2 * 4 * 4, "blocks.0.ffn.net.2"
    assert statistics.rows()[name] == 4 * tokens
    (along,) = record(pipeline, PAIRS, 10, alone=True)
    recording = along.recording
    assert (recording.steps, recording.branches, len(recording)) == (4, 1, 4)
    assert recording.timesteps() == pytest.approx([1000 * sigma for sigma in SIGMAS], abs=1.0)


@pytest.mark.slow
def test_a_run_of_four_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint keeps the method and the shift, so that diffusers alone samples it alike."""
    run = tmp_path / "run"
    words = ["protect=ends", "tracker=none", f"hydra.run.dir={run}", "model.generation.num_frames=5"]
    words += ['prompts.texts=["a red circle moving right on a black background"]']
    words += ['calib.texts=["a blue square moving up on a white background"]']
    few = [f"model.generation.{name}={getattr(preset(), name)}" for name in ("guidance_scale", "flow_shift", "solver")]
    assert ptq(monkeypatch, *words, *few, "model.generation.steps=4", f"model.path={short(3)}") == 0
    result = read_result(run)
    assert result["metrics"]["step_sqnr"]["mean"] < 100
    scheduler = WanPipeline.from_pretrained(run / "checkpoint").scheduler
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([*SIGMAS, 0.0], abs=1e-3)
    assert (scheduler.config.solver_order, scheduler.config.disable_corrector) == (1, [0, 1, 2, 3])
    assert json.loads((run / "result.json").read_text())["generation"]["solver"] == "euler"


def test_the_preset_is_planned_at_the_true_shape(tmp_path: Path) -> None:
    """Given weights: the base model's own are not taken for those of four steps."""
    with pytest.raises(ValueError, match="no model folder FOLDER_OF_THE_DISTILLED_MODEL: give a folder"):
        resolve(composed("model=wan2.1-t2v-14b-4step", "model.device=cpu"))
    plan = resolve(
        composed("model=wan2.1-t2v-14b-4step", "model.device=cpu", "model.path=Wan-AI/Wan2.1-T2V-14B-Diffusers")
    )
    assert plan.model.protected == (0, 1, 37, 38, 39)
    assert plan.settings.branches == 1
    assert estimate_resources(plan, count_videos(plan)).parameters == 14_288_491_584
