"""Single denoising steps: BF16 replayed is BF16 bit for bit, and errors are those of the outputs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs import TWO, ptq, short
from wanquant import load_pipeline
from wanquant.evaluate import single_steps
from wanquant.evaluate.single_steps import measure_steps, measured_now, record
from wanquant.evaluate.sweep import tables
from wanquant.ptq.sensitivity import quantized
from wanquant.quant import QuantConfig
from wanquant.runs.cache import Cache
from wanquant.runs.reports import sweep_table
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.recording import spread

SETTINGS = GenerationConfig(height=64, width=64, num_frames=5, steps=4, guidance_scale=2.0, max_text_length=64)
PAIRS = [("a red circle moving right on a black background", 0), ("a blue square moving up on a white background", 1)]
#: A batch and a half.
THREE = [*PAIRS, (PAIRS[0][0], 2)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CachedPipeline:
    model = ModelConfig(generation=SETTINGS, batch=2, other_frames=[9])
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return CachedPipeline(load_pipeline(short(), "cpu"), model, "as shipped", torch.device("cpu"), cache)


def test_bf16_replayed_is_bit_equal_at_every_length(pipeline: CachedPipeline) -> None:
    found = record(pipeline, THREE, 2)
    assert [along.name for along in found] == ["step_sqnr", "step_sqnr_9"]
    for along in found:
        found = measured_now(along, lambda: None)
        assert found.decibels.shape == (3, 2, 2)
        assert (found.decibels == 100.0).all()


def test_errors_are_those_of_the_outputs(pipeline: CachedPipeline) -> None:
    (along,) = record(pipeline, THREE, 2, alone=True)
    recording = along.recording
    assert recording.kept == [1, 3]
    ticks: list[None] = []
    with quantized(pipeline.transformer, QuantConfig(), [0]), torch.no_grad():
        found = measured_now(along, lambda: ticks.append(None))
        place = (2 * recording.steps + 1) * recording.branches  # the third pair's last step, with its prompt
        step = recording[place]
        given = step.noisy[None], step.timestep[None], pipeline.embedding(step.prompt)[None]
        output = pipeline.transformer(*given, return_dict=False)[0][0].double()
    error = (output - step.output.double()).square().sum() / step.output.double().square().sum()
    assert found.decibels[2, 1, 0] == pytest.approx(-10 * math.log10(error), abs=0.1)  # torch's BF16 rounds otherwise
    assert len(ticks) == recording.passes == 2 * 2
    assert 10 < found.decibels.min() < found.decibels.max() < 60
    assert [item.value for item in found.items()] == pytest.approx(found.decibels.mean((1, 2)).tolist())
    assert found.sigmas == sorted(found.sigmas, reverse=True)
    told = found.as_json()
    assert told["by_step"][1]["mean"] == pytest.approx(found.decibels[:, 1].mean())
    assert told["by_branch"][1]["mean"] == pytest.approx(found.decibels[:, :, 1].mean())


def test_measured_once_and_what_is_not_finite_is_known_as_such(pipeline: CachedPipeline) -> None:
    (along,) = record(pipeline, PAIRS, 1, alone=True)
    weight = pipeline.transformer.proj_out.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    try:
        found = measure_steps(along, {"broken": True})
    finally:
        with torch.no_grad():
            weight[0, 0] = before
    assert np.isnan(found.decibels).all()
    known = measure_steps(along, {"broken": True})
    assert dataclasses.replace(known, decibels=found.decibels) == dataclasses.replace(found, decibels=found.decibels)
    assert (measure_steps(along, {"broken": True}, afresh=True).decibels == 100.0).all()


def test_more_pairs_cost_their_own_batches_only(pipeline: CachedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was stopped goes on at its batch."""
    real, seen = single_steps.step_sqnrs, list[Any]()
    (two,), (three,) = (record(pipeline, pairs, 1, alone=True) for pairs in (PAIRS, THREE))

    def counted(*args: Any) -> Any:
        seen.append(args[2])
        return real(*args)

    monkeypatch.setattr(single_steps, "step_sqnrs", counted)
    before = measure_steps(two, {"what": "this"})
    after = measure_steps(three, {"what": "this"})
    assert seen == [0, 1]
    assert (after.decibels[:2] == before.decibels).all()


def test_steps_are_spread_over_the_trajectory() -> None:
    assert spread(20, 10) == list(range(1, 20, 2))
    assert spread(50, 20)[:3] == [1, 3, 6]
    assert spread(3, 10) == [0, 1, 2]
    assert spread(20, 1) == [10]


@pytest.mark.slow
def test_a_run_without_videos_ranks_by_single_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [
        TWO,
        "eval.videos=false",
        "eval.block_sqnr=true",
        "model.other_frames=[9]",
        "tracker=none",
        "checkpoint=false",
    ]
    assert ptq(monkeypatch, *alone, "protect=none", f"hydra.run.dir={tmp_path / '0'}") == 0
    assert ptq(monkeypatch, *alone, "protect=boundary", f"hydra.run.dir={tmp_path / '1'}") == 0
    assert "gates: no videos were made" in capsys.readouterr().out
    first, second = (read_result(tmp_path / name) for name in ("0", "1"))
    assert second["metrics"].keys() == {"step_sqnr", "step_sqnr_9"}
    assert second["metrics"]["step_sqnr"]["mean"] > first["metrics"]["step_sqnr"]["mean"]
    assert second["verdict"] == "no videos"
    assert not (tmp_path / "1" / "videos").exists()
    assert "No videos were made" in (tmp_path / "1" / "report.html").read_text()
    # Both in a table, ranked, with nothing said of videos.
    summary = tables.report(tmp_path)
    heads, rows, _ = sweep_table.cells(summary)
    assert [row["name"] for row in summary["rows"]] == ["boundary", "none"]
    assert {row[heads.index("gates")] for row in rows} == {"no videos"}
    assert "PSNR, dB" not in heads
    # The same with videos: single steps come from the cache.
    assert ptq(monkeypatch, *alone[:1], *alone[2:], "protect=boundary", f"hydra.run.dir={tmp_path / 'whole'}") == 0
    whole = read_result(tmp_path / "whole")
    assert whole["metrics"]["step_sqnr"] == second["metrics"]["step_sqnr"]
    assert "latent_sqnr" in whole["metrics"]
