"""Methods for few bits in jobs: Hessians kept by block, whatever the memory; scales by denoising step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.jobs import CACHE, ptq, short
from tests.wan.pair import make_pair
from wanquant import load_pipeline
from wanquant.ptq.calibrator import Calibrator
from wanquant.quant import ActivationConfig, QuantConfig, WeightConfig
from wanquant.quant.feedback import feedback_bytes
from wanquant.quant.scheme import parse
from wanquant.runs.cache import Cache
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.find import find_model
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.resources.choice import choose
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts

SETTINGS = GenerationConfig(height=64, width=64, num_frames=5, steps=1, guidance_scale=2.0, max_text_length=64)
PAIRS = [("a cyan square moving left on a black background", seed) for seed in (1000, 1001)]
INT4 = QuantConfig(format="int4_g128", weights=WeightConfig(feedback=True), activations=ActivationConfig(format="bf16"))


def calibrator_of(folder: Path, at_a_time: int) -> Calibrator:
    pipe = load_pipeline(short(), "cpu")
    pipeline = CachedPipeline(pipe, ModelConfig(generation=SETTINGS), "as shipped", torch.device("cpu"), Cache(folder))
    return Calibrator(pipeline, parse(INT4), PAIRS, bins=1, hessian_blocks=at_a_time)


def test_hessians_do_not_depend_on_how_many_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, apart = calibrator_of(tmp_path / "together", 8), calibrator_of(tmp_path / "apart", 5)
    whole, parts = together.hessians(), apart.hessians()
    assert len(whole) == 80
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # What a stop has left is made up for, and nothing else.
    left = sorted((tmp_path / "apart" / "hessians").glob("*-003"))
    apart.pipeline.cache.forget("hessians", *(path.name for path in left))
    watched: list[list[str]] = []
    real = Calibrator._make_hessians
    monkeypatch.setattr(
        Calibrator, "_make_hessians", lambda self, linears: (watched.append([*linears]), real(self, linears))[1]
    )
    again = calibrator_of(tmp_path / "apart", 5).hessians()
    assert watched == [[path.name for path in left]]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_they_need_is_predicted(tmp_path: Path) -> None:
    calibrator = calibrator_of(tmp_path, 8)
    found = calibrator.hessians()
    sizes = {path.parent.name[-3:]: path.stat().st_size for path in (tmp_path / "hessians").rglob("*.safetensors")}
    files, counts = find_model(str(short()), shapes_only=True), VideoCounts(2, 2, calibrated=2)
    needs = ResourceEstimate(files, parse(INT4), (), (), SETTINGS, counts, 1, torch.device("cpu"))
    assert len(found) == 80
    for size in sizes.values():
        assert 0 < size - needs.hessian < 5000  # the file's own header
    assert choose(needs, "none")[0].hessian_blocks == 8
    assert needs.feeding == max(needs.hessian, feedback_bytes(nn.Linear(512, 128)))
    protected = replace(needs, protected=tuple(range(8)))  # nothing is rounded
    assert protected.feeding == needs.hessian


@pytest.mark.slow
def test_a_job_rounds_with_feedback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("quant=nvfp4_gptq", "protect.blocks=[0,1,2,3,4,5,6]", "eval.videos=false", f"hydra.run.dir={tmp_path}")
    assert ptq(monkeypatch, *words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["quant"]["weights"]["feedback"] is True
    assert result["conversion"]["converted"] > 0
    assert list((Path(CACHE) / "hessians").glob("*-007"))


@pytest.mark.slow
def test_two_transformers_have_hessians_and_scales_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of its own steps: of three the first takes two, and what a transformer has not seen is as the nearest."""
    model = make_pair(tmp_path / "pair", [0, 1], [2, 3])
    words = ("quant=nvfp4_steps", "quant.activations.steps=3", "quant.weights.feedback=true", "eval.videos=false")
    words += ("protect.blocks=[0,2]", "protect.through=true", f"model.path={model}", "model.generation.steps=3")
    assert ptq(monkeypatch, *words, "checkpoint=true", f"hydra.run.dir={tmp_path / 'run'}") == 0
    pipe = load_pipeline(tmp_path / "run" / "checkpoint", "cpu")
    first, second = (part.blocks[1].attn1.to_v for part in (pipe.transformer, pipe.transformer_2))
    assert [len(set(layer.input_scale.tolist())) for layer in (first, second)] == [2, 1]
    assert first.input_bounds[1] < 0 < first.input_bounds[0] < 1000 < second.input_bounds[1]
    seen: list[float] = []
    for part in (pipe.transformer, pipe.transformer_2):
        part.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(float(kwargs["timestep"].max())), with_kwargs=True
        )
    frames = pipe("a red circle", height=64, width=64, num_frames=5, num_inference_steps=5, output_type="latent").frames
    assert torch.isfinite(torch.as_tensor(frames)).all()
    assert len(seen) == 10


@pytest.mark.parametrize("name", ["static_steps", "nvfp4_steps"])
def test_more_bins_than_steps_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert ptq(monkeypatch, f"quant={name}", "dry_run=true") == 1
    assert "quant.activations.steps=4: calibration has 1 denoising steps, choose" in capsys.readouterr().err


def test_a_conversion_from_files_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(monkeypatch, "quant=int4_gptq", "mode=convert", f"hydra.run.dir={tmp_path}") == 1
    assert "quant.weights.feedback=true needs more of calibration" in capsys.readouterr().err
