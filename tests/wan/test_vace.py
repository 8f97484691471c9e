"""VACE: a second list of blocks beside the first, a control video that is empty, and reference pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import ptq
from tests.test_config import composed
from tests.wan.variants import first_frame, vace
from wanquant import load_pipeline, quantize_
from wanquant.evaluate.single_steps import measured_now, record
from wanquant.ptq.estimate import count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.ptq.protect import ProtectConfig, by_rule
from wanquant.quant import QuantConfig
from wanquant.runs.cache import Cache
from wanquant.runs.files import sum_of_file
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.config import GenerationConfig, ModelConfig, Picture
from wanquant.wan.generate import generate, initial_noise, open_picture
from wanquant.wan.products import quick_products

CPU = torch.device("cpu")
TEXTS = ["a red circle moving right on a black background", "a blue square moving up on a white background"]
SETTINGS = GenerationConfig(32, 48, 5, 2, 2.0, 3.0, 24, 8)
TENSORS = "checkpoint/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vace(tmp_path_factory.mktemp("model") / "vace")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    paths = {text: first_frame(tmp_path_factory.mktemp("pictures"), text) for text in TEXTS}
    return {text: Picture(path, sum_of_file(path)) for text, path in paths.items()}


def words(model: Path, folder: Path) -> list[str]:
    found = [f"model.path={model}", "tracker=none", "protect=ends", f"hydra.run.dir={folder}", "model.other_frames=[]"]
    found += [f'prompts.texts=["{TEXTS[0]}"]', f'calib.texts=["{TEXTS[1]}"]', "eval.noise_floor=false"]
    sizes = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "max_text_length": 24}
    return [*found, *(f"model.generation.{name}={size}" for name, size in sizes.items())]


@pytest.mark.slow
def test_a_run_with_a_reference_picture(
    model: Path, pictures: dict[str, Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lists are quantized, each protected block with what is beside it; saved as a conversion makes it."""
    folder, cache = tmp_path / "run", f"cache={tmp_path / 'cache'}"
    shown = [
        f"{g}.images={json.dumps([str(pictures[t].path)])}" for g, t in zip(("prompts", "calib"), TEXTS, strict=True)
    ]
    assert ptq(monkeypatch, *words(model, folder), *shown, cache) == 0
    result = read_result(folder)
    assert result["protect"]["blocks"] == [0, 3, 4]
    converted = {row["name"].split(".")[1] for row in result["modules"] if row["status"] == "converted"}
    assert converted == {"1", "2", "5"}
    assert result["metrics"]["step_sqnr"]["mean"] < 100
    assert ptq(monkeypatch, "mode=convert", *words(model, tmp_path / "converted"), cache) == 0
    made, stored = (load_file(tmp_path / name / TENSORS) for name in ("converted", "run"))
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)
    assert stored["vace_blocks.1.proj_out.weight"].dtype == torch.uint8
    assert stored["vace_blocks.0.proj_out.weight"].dtype == torch.bfloat16


def test_a_reference_picture_is_no_part_of_the_video(model: Path, pictures: dict[str, Picture]) -> None:
    """The pipeline's own latents without the frame in front of them; other noise than without a picture, which has a
    frame less."""
    pipe, pair = load_pipeline(model, "cpu"), (TEXTS[0], 0)
    found = generate(pipe, [pair], SETTINGS, pictures=pictures)[0]
    sizes = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 24}
    with quick_products(CPU):
        alone = pipe(
            prompt=TEXTS[0],
            negative_prompt="",
            reference_images=[open_picture(pictures[TEXTS[0]], SETTINGS)],
            guidance_scale=2.0,
            latents=initial_noise(pipe, 0, SETTINGS, further=1),
            output_type="np",
            **sizes,
        ).frames[0]
    assert found.latents.shape[1] == 2
    assert (found.video == alone).all()
    assert generate(pipe, [pair], SETTINGS)[0].video.shape == found.video.shape


@pytest.mark.parametrize("shown", [True, False])
def test_single_steps_are_replayed_with_their_control(
    shown: bool, model: Path, pictures: dict[str, Picture], tmp_path: Path
) -> None:
    config, given = ModelConfig(generation=SETTINGS), pictures if shown else {}
    made = CachedPipeline(load_pipeline(model, "cpu"), config, "vace", CPU, Cache(tmp_path), given)
    (along,) = record(made, [(TEXTS[0], 0)], 2, alone=True)
    assert (measured_now(along, lambda: None).decibels == 100.0).all()
    quantize_(made.transformer, QuantConfig())
    assert (measured_now(along, lambda: None).decibels < 100.0).all()


def test_blocks_are_protected_with_those_beside_them() -> None:
    """Of each transformer; the last from the end is the last of the first list, and those beside can be named."""
    beside = [0, 2]
    assert by_rule(ProtectConfig(blocks=[0, -1]), 6, 1, beside) == [0, 3, 4]
    assert by_rule(ProtectConfig(blocks=[2]), 12, 2, beside) == [2, 5, 8, 11]
    assert by_rule(ProtectConfig(blocks=[5]), 6, 1, beside) == [5]
    assert by_rule(ProtectConfig(by="middle", budget=2), 6, 1, beside) == [1, 2, 5]
    assert by_rule(ProtectConfig(blocks=[0, 2], through=True), 6, 1, beside) == [0, 2]


@pytest.mark.slow
def test_the_true_size_is_planned() -> None:
    plan = resolve(composed("model=wan2.1-vace-14b", "protect=boundary", 'prompts.texts=["a"]', 'calib.texts=["b"]'))
    estimate = estimate_resources(plan, count_videos(plan))
    assert plan.model.blocks == 48
    assert estimate.report.protected_blocks == (0, 1, 37, 38, 39, 40)
    assert estimate.parameters == pytest.approx(17.34e9, rel=5e-3)
    assert estimate.report.counts()["converted"] == 35 * 10 + 7 * 11
    assert 5e9 < estimate.each_activations[0] < 20e9
