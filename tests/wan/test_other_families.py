"""LTX-Video and HunyuanVideo: other block lists, latents, text encoders and ways of guidance, and the same jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from tests.jobs import ptq, run
from tests.test_config import composed
from tests.wan.variants import hunyuan, ltx
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.evaluate.single_steps import measured_now, record
from wanquant.ptq.estimate import count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.quant import QuantConfig
from wanquant.quant.statistics import Layout, Observer
from wanquant.runs.cache import Cache
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.checkpoint import quantized_linears, read_json
from wanquant.wan.checkpoints.export import export_all
from wanquant.wan.checkpoints.find import find_model
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.experts import whole_of
from wanquant.wan.generate import Position, generate, initial_noise
from wanquant.wan.products import quick_products
from wanquant.wan.resources.probe import encoding_seconds

CPU = torch.device("cpu")
KINDS = {"ltx": ltx, "hunyuan": hunyuan}
GUIDANCE = {"ltx": "batch", "hunyuan": "embedded"}
#: By family, the names of the blocks as they are numbered through.
BLOCKS = {
    "ltx": [f"transformer_blocks.{place}" for place in range(4)],
    "hunyuan": [*(f"transformer_blocks.{place}" for place in range(2))]
    + [f"single_transformer_blocks.{place}" for place in range(3)],
}
TEXTS = ["a red circle", "a blue square"]
TENSORS = "checkpoint/transformer/diffusion_pytorch_model.safetensors"
OWN: dict[str, Any] = {"steps": 2, "height": 64, "width": 64, "num_frames": 9, "max_text_length": 24, "solver": "euler"}
OWN |= {"guidance_scale": 3.0, "fps": 16}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[kind](tmp_path_factory.mktemp("models") / kind)


def settings_of(kind: str, **other: Any) -> GenerationConfig:
    return GenerationConfig(**{**OWN, "guidance": GUIDANCE[kind], "flow_shift": 5.0, **other})


def words(kind: str, model: Path, folder: Path) -> list[str]:
    """A whole run on two texts in one batch, with the first and the last block protected."""
    given = {**OWN, "guidance": GUIDANCE[kind], "flow_shift": "null"}
    found = [f"model.path={model}", "tracker=none", "protect=ends", f"hydra.run.dir={folder}", "model.other_frames=[]"]
    found += [f"prompts.texts={json.dumps(TEXTS)}", "model.batch=2", "eval.noise_floor=false", "model.language=english"]
    return [*found, *(f"model.generation.{name}={value}" for name, value in given.items())]


@pytest.mark.slow
def test_a_run_and_what_becomes_of_its_checkpoint(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are numbered through all lists; the checkpoint is the one that a conversion from files to files writes,
    and makes the run's own latents."""
    folder, cache = tmp_path / "run", f"cache={tmp_path / 'cache'}"
    assert ptq(monkeypatch, *words(kind, model, folder), 'calib.texts=["a green triangle"]', cache) == 0
    result, names = read_result(folder), BLOCKS[kind]
    assert result["protect"]["blocks"] == [0, len(names) - 1]
    assert result["metrics"]["step_sqnr"]["mean"] < 100
    converted = {row["name"].split(".")[1] for row in result["modules"] if row["status"] == "converted"}
    assert converted == {str(place) for place in range(1, len(names) - 1)}
    described = read_json(folder / "checkpoint" / "transformer" / "config.json")["quantization_config"]
    assert described["protected_blocks"] == [0, len(names) - 1]
    assert {".".join(name.split(".")[:2]) for name in described["modules"]} == set(names[1:-1])
    plain, stored = (load_file(path) for path in (model / TENSORS.split("/", 1)[1], folder / TENSORS))
    kept = [name for name in plain if name.startswith((names[0], names[-1]))]
    assert all(torch.equal(plain[name], stored[name]) for name in kept)
    assert ptq(monkeypatch, "mode=convert", *words(kind, model, tmp_path / "converted"), cache) == 0
    made = load_file(tmp_path / "converted" / TENSORS)
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)
    pipe, settings = load_pipeline(folder / "checkpoint", "cpu"), settings_of(kind, flow_shift=None)
    again = generate(pipe, [(text, 0) for text in TEXTS], settings, decode=False, batch=2)
    files = [load_file(path) for path in (tmp_path / "cache").glob("latents/*/latents.safetensors")]
    assert any(
        torch.equal(found["0"], again[0].latents) and torch.equal(found["1"], again[1].latents) for found in files
    )
    other = [f"run={folder}", 'prompts.texts=["a yellow star"]', "tracker=none", cache, "eval.noise_floor=false"]
    assert run(monkeypatch, "eval", *other, "model.device=cpu") == 0
    (entry,) = read_result(folder)["evaluations"].values()
    assert entry["metrics"]["psnr"]["n"] == 1


def test_videos_are_those_of_the_pipeline(kind: str, model: Path) -> None:
    """Given the same noise, bit for bit; and in a batch from their own prompts."""
    pipe, settings = load_pipeline(model, "cpu"), settings_of(kind)
    found = generate(pipe, [(TEXTS[0], 0)], settings)[0]
    noise = initial_noise(pipe, 0, settings)
    if kind == "ltx":
        noise = pipe._pack_latents(noise)
    given = {"prompt": TEXTS[0], "negative_prompt": "", "height": 64, "width": 64, "num_frames": 9}
    given |= {"num_inference_steps": 2, "guidance_scale": 3.0, "latents": noise, "max_sequence_length": 24}
    given |= {"frame_rate": 16} if kind == "ltx" else {}
    with quick_products(CPU):
        alone = pipe(**given, output_type="np").frames[0]
    assert found.video.shape == (9, 64, 64, 3)
    assert (found.video == alone).all()
    both = generate(pipe, [(text, 0) for text in TEXTS], settings, decode=False, batch=2)
    assert not torch.equal(both[0].latents, both[1].latents)


def test_single_steps_are_replayed_bit_for_bit(kind: str, model: Path, tmp_path: Path) -> None:
    config = ModelConfig(generation=settings_of(kind), batch=2)
    made = CachedPipeline(load_pipeline(model, "cpu"), config, kind, CPU, Cache(tmp_path))
    (along,) = record(made, [(text, 0) for text in TEXTS], 2, alone=True)
    branches = 2 if kind == "ltx" else 1
    found = measured_now(along, lambda: None).decibels
    assert found.shape == (2, 2, branches)
    assert (found == 100.0).all()
    quantize_(made.transformer, QuantConfig())
    assert (measured_now(along, lambda: None).decibels < 100.0).all()


def test_without_guidance_a_step_takes_one_row(tmp_path: Path) -> None:
    pipe, rows = load_pipeline(ltx(tmp_path / "ltx"), "cpu"), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    for scale in (3.0, 1.0):
        generate(pipe, [(TEXTS[0], 0)], settings_of("ltx", guidance_scale=scale, steps=1), decode=False)
    assert rows == [2, 1]


def test_blocks_of_all_lists_are_one_list(kind: str, model: Path) -> None:
    pipe, names = load_pipeline(model, "cpu"), BLOCKS[kind]
    whole = whole_of(pipe)
    assert [whole.blocks[place] for place in range(len(names))] == [pipe.transformer.get_submodule(n) for n in names]
    if kind == "hunyuan":  # whose second encoder takes 77 tokens, whatever the first is asked for
        assert encoding_seconds(model / "text_encoder_2", CLIPTextModel, 256, CPU) > 0
    report = quantize_(whole, QuantConfig(), (0, -1))
    assert report.protected_blocks == (0, len(names) - 1)
    assert {".".join(name.split(".")[:2]) for name in quantized_linears(pipe.transformer)} == set(names[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "parameters", "blocks", "weights"),
    [("ltx-video", 1.923e9, 28, 4.76e9), ("hunyuan-video", 12.82e9, 60, 7.63e9)],
)
def test_the_true_size_is_planned(preset: str, parameters: float, blocks: int, weights: float) -> None:
    """Names, protection and memory, from the config files that come along; ``weights`` of the text encoders."""
    plan = resolve(composed(f"model={preset}", "protect=boundary", 'prompts.texts=["a dog"]', 'calib.texts=["a cat"]'))
    assert plan.model.blocks == blocks
    estimate = estimate_resources(plan, count_videos(plan))
    assert estimate.report.protected_blocks == (0, 1, blocks - 3, blocks - 2, blocks - 1)
    assert estimate.parameters == pytest.approx(parameters, rel=1e-3)
    assert estimate.text_encoder[0] == pytest.approx(2 * weights, rel=1e-2)
    denoising, decoding = estimate.each_activations
    assert 0 < denoising < 40e9
    assert 0 < decoding < 40e9


def test_steps_are_counted_where_timesteps_are_one_in_bf16(tmp_path: Path) -> None:
    """HunyuanVideo's pipeline rounds them: at a shift of 7 two of fifty are one."""
    pipe, position = load_pipeline(hunyuan(tmp_path / "hunyuan"), "cpu"), Position()
    settings, seen = settings_of("hunyuan", steps=50, flow_shift=7.0, num_frames=1, height=16, width=16), []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(position.where()[1:]))
    generate(pipe, [(TEXTS[0], 0)], settings, decode=False, position=position)
    assert seen == [(step, 0) for step in range(50)]


def test_what_one_block_alone_has_is_its_own(tmp_path: Path) -> None:
    """The modulation's input is the same in all blocks of a kind, and the kinds have other names for it."""
    pipe = load_pipeline(hunyuan(tmp_path / "hunyuan"), "cpu")
    layout = Layout(("",), 2, 1, 1, full=False)
    position = Position()
    with Observer(whole_of(pipe), layout, position.where) as observer:
        generate(pipe, [(TEXTS[0], 0)], settings_of("hunyuan"), decode=False, position=position)
    for block in range(5):
        own = {name.split(".", 2)[2] for name in observer.statistics.own_inputs(block)}
        assert not {"norm1.linear", "norm1_context.linear", "norm.linear"} & own
        assert "attn.to_q" in own


def test_only_its_own_layouts_leave_a_checkpoint(model: Path, kind: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model, "cpu")
    quantize_(whole_of(pipe), QuantConfig())
    saved = save_quantized(pipe, tmp_path / "saved")
    with pytest.raises(ValueError, match="compressed-tensors is a layout for Wan's transformers"):
        export_all(saved, tmp_path / "exported", "compressed-tensors")
    export_all(saved, tmp_path / "plain", "bf16")
    with pytest.raises(ValueError, match=r"and the pipeline in .* has a WanTransformer3DModel"):
        find_model(saved / "transformer", "tiny")
    assert run_dry(saved, kind) == 0


def run_dry(saved: Path, kind: str) -> int:
    """What ``eval.py`` would do with a checkpoint."""
    given = [f"model.generation.{name}={value}" for name, value in {**OWN, "guidance": GUIDANCE[kind]}.items()]
    with pytest.MonkeyPatch.context() as patch:
        words_ = [f"model.path={saved}", "model.language=english", f"prompts.texts={json.dumps(TEXTS)}", "dry_run=true"]
        return run(patch, "eval", *words_, "model.generation.flow_shift=null", "tracker=none", *given)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.generation.guidance=branches", "of a LTXPipeline it is batch"),
        ("model.generation.solver=unipc", "of a LTXPipeline it is euler"),
        ("model.generation.num_frames=13", "num_frames=13: must be 8n + 1"),
        ("model.generation.width=80", "width=80: must be a multiple of 32"),
        ("model.lora=[a.safetensors]", "model.lora is for Wan's transformers"),
        ("quant.attention=qkv", "quantized attention is Wan's, and this one is run by LTXVideoAttnProcessor"),
    ],
)
def test_what_they_cannot_do_is_refused(
    change: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(monkeypatch, *words("ltx", ltx(tmp_path / "ltx"), tmp_path / "run"), change) == 1
    assert told in capsys.readouterr().err
    assert run(monkeypatch, "train", *words("ltx", tmp_path / "ltx", tmp_path / "run")) == 1
    assert "train.py trains Wan's transformers" in capsys.readouterr().err
