"""A LoRA that stays beside weights which alone are quantized (``model.lora_fuse=false``): against diffusers' and peft's
own, and through whole jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import jobs
from tests.wan.pair import make_pair
from wanquant import load_pipeline, quantize_
from wanquant.ptq.sensitivity import quantized
from wanquant.quant import QuantConfig
from wanquant.quant.convert import folded_names
from wanquant.quant.statistics import Layout, Observer, Statistics
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.checkpoint import quantized_linears, save_quantized
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.experts import whole_of
from wanquant.wan.families import folds_of
from wanquant.wan.generate import generate
from wanquant.wan.lora import check_loras, keep_loras_beside_, load_loras

PAIR = [("a red circle moving right on a black background", 0)]
SETTINGS = GenerationConfig(64, 64, 5, 2, 2.0, 3.0, 64, 8)
#: In and outside blocks, also what stays float32, and the convolution.
MODULES = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn1.to_v",
    "blocks.1.attn1.to_out.0",
    "blocks.1.ffn.net.2",
    "patch_embedding",
    "condition_embedder.time_embedder.linear_1",
    "proj_out",
)
SMOOTH = QuantConfig(smoothing=0.5)


def lora(model: Any, path: Path, modules: Sequence[str] = MODULES, rank: int = 3) -> str:
    """A file in which each module has another rank."""
    state, generator = dict[str, torch.Tensor](), torch.Generator().manual_seed(rank)
    for place, name in enumerate(modules):
        weight, r = model.get_submodule(name).weight, rank + place
        further = [1] * (weight.ndim - 2)
        state[f"transformer.{name}.lora_A.weight"] = 0.2 * torch.randn(r, *weight.shape[1:], generator=generator)
        state[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(len(weight), r, *further, generator=generator)
        state[f"transformer.{name}.alpha"] = torch.tensor(float(rank))
    save_file(state, path)
    return str(path)


def latents(pipe: Any) -> torch.Tensor:
    return generate(pipe, PAIR, SETTINGS, decode=False)[0].latents


def seen(pipe: Any, full: bool = False) -> Statistics:
    layout = Layout(("a",), SETTINGS.steps, 1, 2, full)
    with Observer(pipe.transformer, layout, lambda: (0, 0, 0)) as observer:
        latents(pipe)
    return observer.statistics


@pytest.mark.parametrize("packed", [None, False, True])
def test_it_is_what_peft_makes_of_it(packed: bool | None, tmp_path: Path) -> None:
    """Bit for bit, of BF16 and of what is quantized afterwards; the quantized weights do not know of it."""
    plain, ours, theirs = (load_pipeline(jobs.short(2), device="cpu") for _ in range(3))
    given = [f"{lora(plain.transformer, tmp_path / 'a.safetensors')}:0.7"]
    given.append(lora(plain.transformer, tmp_path / "b.safetensors", MODULES[:2], 5))
    keep_loras_beside_(ours.transformer, given)
    if packed is not None:
        for pipe in (plain, ours, theirs):
            quantize_(pipe.transformer, QuantConfig(packed=packed), [0])
    load_loras(theirs, given)
    found = latents(ours)
    assert torch.equal(found, latents(theirs))
    assert not torch.allclose(found, latents(plain), atol=0.05)
    own = ours.transformer.state_dict()
    assert own.keys() == plain.transformer.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.transformer.state_dict().items())


def test_each_transformer_has_its_own(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / "pair", [0, 1], [2, 3])
    ours, theirs, both = (load_pipeline(folder, device="cpu") for _ in range(3))
    first = lora(ours.transformer, tmp_path / "a.safetensors", MODULES[:3])
    second = lora(ours.transformer, tmp_path / "b.safetensors", MODULES[2:], 5)
    keep_loras_beside_(whole_of(ours), [f"high={first}:0.7", f"low={second}"])
    load_loras(theirs, [f"high={first}:0.7", f"low={second}"])
    load_loras(both, [f"{first}:0.7", second])
    assert torch.equal(latents(ours), latents(theirs))
    assert not torch.equal(latents(ours), latents(both))
    assert theirs.get_list_adapters() == {"transformer": ["lora_0"], "transformer_2": ["lora_1"]}


def test_a_block_that_is_quantized_alone_keeps_it(tmp_path: Path) -> None:
    """As sensitivities and the errors of blocks are measured."""
    pipe, other = (load_pipeline(jobs.short(2), device="cpu") for _ in range(2))
    given = [lora(pipe.transformer, tmp_path / "a.safetensors")]
    keep_loras_beside_(pipe.transformer, given)
    quantize_(other.transformer, QuantConfig(), [0])
    keep_loras_beside_(other.transformer, given)
    before = latents(pipe)
    with quantized(pipe.transformer, QuantConfig(), [0]):
        assert torch.equal(latents(pipe), latents(other))
    assert torch.equal(latents(pipe), before)


def test_calibration_sees_it(tmp_path: Path) -> None:
    """The inputs of linears are those of peft's model; A and B are no linears of the model."""
    plain, ours, theirs = (load_pipeline(jobs.short(2), device="cpu") for _ in range(3))
    given = [lora(plain.transformer, tmp_path / "a.safetensors")]
    keep_loras_beside_(ours.transformer, given)
    load_loras(theirs, given)
    found, wanted, without = (seen(pipe).input_absmax() for pipe in (ours, theirs, plain))
    assert found.keys() == without.keys()
    for name, value in found.items():
        assert value == wanted.get(name, wanted.get(f"{name}.base_layer"))
    assert found["blocks.1.attn1.to_out.0"] != without["blocks.1.attn1.to_out.0"]


def test_smoothing_folds_nothing_that_a_lora_reads_or_adds_to(tmp_path: Path) -> None:
    """What is saved with it beside is what it fits again; what was folded without it is refused."""
    pipe = load_pipeline(jobs.short(2), device="cpu")
    given = [lora(pipe.transformer, tmp_path / "a.safetensors")]
    folds = folds_of(pipe.transformer)
    keep_loras_beside_(pipe.transformer, given)
    statistics = seen(pipe, full=True)
    stats = {name: statistics.site(name, "input") for name in statistics.inputs()}
    quantize_(pipe.transformer, SMOOTH, stats=stats, folds=folds)
    folded = folded_names(pipe.transformer, folds)
    assert "blocks.0.attn1.to_v" in folded
    assert not {"blocks.1.attn1.to_v", "blocks.1.attn1.to_out.0"} & folded
    loaded = load_pipeline(save_quantized(pipe, tmp_path / "saved"), device="cpu")
    load_loras(loaded, given)
    assert torch.equal(latents(loaded), latents(pipe))
    other = load_pipeline(jobs.short(2), device="cpu")
    quantize_(other.transformer, SMOOTH, stats=stats, folds=folds)
    for add in (lambda: load_loras(other, given), lambda: keep_loras_beside_(other.transformer, given)):
        with pytest.raises(ValueError, match=r"smoothing or rotation is folded into blocks\.1\.attn1\.to_(v|out)"):
            add()


def test_its_bytes_are_counted(tmp_path: Path) -> None:
    model = load_pipeline(jobs.short(2), device="cpu").transformer
    path = lora(model, tmp_path / "a.safetensors", MODULES[:1])
    asked = ModelConfig(lora=[path], lora_fuse=False)
    assert check_loras(asked, model) == 2 * (3 * 128 + 128 * 3 + 1)
    assert check_loras(ModelConfig(lora=[path]), model) == 0


REFUSED = {
    "ptq model.outliers.count=1": "model.outliers are planted in weights alone: leave them out, or",
    "train qat=on": "model.lora_fuse=false: train.py trains weights with the LoRA fused into them",
    "ptq mode=convert": "mode=convert takes a model as its files have it: leave model.lora out, or mode=quantize",
}


@pytest.mark.parametrize("words", REFUSED)
def test_where_it_makes_no_sense(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lora(load_pipeline(jobs.short(2), device="cpu").transformer, tmp_path / "a.safetensors")
    program, word = words.split()
    asked = [word, f"model.path={jobs.short(2)}", f"model.lora=['{path}']", "model.lora_fuse=false", *jobs.QUICK]
    where = [f"hydra.run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"]
    assert jobs.run(monkeypatch, program, *asked, *where) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {REFUSED[words]}")


def made(cache: Path, pairs: Sequence[tuple[str, int]]) -> list[list[torch.Tensor]]:
    """The latents in a cache, batch by batch."""
    files = [load_file(path) for path in sorted(cache.glob("latents/*/latents.safetensors"))]
    return [[file[str(place)] for place in range(len(pairs))] for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("transformers", [1, 2])
def test_a_job_keeps_it_beside(transformers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """BF16's videos and the quantized ones have it, the checkpoint does not; that and ``load_loras`` give the videos of
    the run again, bit for bit. Fused it is another run, and another BF16."""
    source = jobs.short(2) if transformers == 1 else make_pair(tmp_path / "pair", [0, 1], [2, 3])
    plain = load_pipeline(source, device="cpu")
    monkeypatch.chdir(tmp_path)
    names = [f"{name}, 1=0:1.safetensors" for name in "ab"]
    first, second = (lora(plain.transformer, Path(name), MODULES[2 * place :]) for place, name in enumerate(names))
    given = [f"./{first}:0.7"] if transformers == 1 else [f"high={first}:0.7", f"low={second}:1.0"]
    asked = [f"model.path={source}", f"model.lora={json.dumps(given)}", jobs.TWO, "prompts.seeds=[0]", *jobs.TWO_STEPS]
    asked += ["cache=cache", "eval.noise_floor=false", "protect=none", "protect.blocks=[0]"]
    assert jobs.ptq(monkeypatch, *asked, "model.lora_fuse=false", "hydra.run.dir=run") == 0
    batches = [load_file(path) for path in sorted(Path("cache").glob("latents/*/latents.safetensors"))]
    result = read_result(Path("run"))
    told = [(each["file"], each["scale"], each["transformer"], each["fused"]) for each in result["model"]["lora"]]
    wanted = [(names[0], 0.7, "high", False), (names[1], 1.0, "low", False)]
    assert told == (wanted if transformers == 2 else [(names[0], 0.7, "", False)])
    shown = (
        f"The LoRA {names[0]}{' (high-noise transformer)' if transformers == 2 else ''} runs in BF16 beside the weights"
    )
    assert shown in " ".join(Path("run/report.html").read_text().split())
    assert f"load_loras(pipe, {json.dumps(given)})" in Path("run/checkpoint/README.md").read_text()

    checkpoint, original = load_pipeline("run/checkpoint", device="cpu"), load_pipeline(source, device="cpu")
    quantize_(whole_of(plain), QuantConfig(), result["protect"]["blocks"])
    for name, layer in quantized_linears(whole_of(plain)).items():
        assert torch.equal(layer.weight, whole_of(checkpoint).get_submodule(name).weight)
    pairs = [(item["prompt"], item["seed"]) for item in result["metrics"]["psnr"]["per_item"]]
    how = (GenerationConfig(**result["generation"]),)
    for pipe in (checkpoint, original):
        load_loras(pipe, given)
        again = generate(pipe, pairs, *how, decode=False, batch=result["model"]["batch"])
        same = [all(torch.equal(batch[str(i)], each.latents) for i, each in enumerate(again)) for batch in batches]
        assert same.count(True) == 1

    assert jobs.ptq(monkeypatch, *asked, "hydra.run.dir=fused") == 0
    fused = read_result(Path("fused"))
    assert not fused["provenance"]["from_cache"]
    assert not Path("fused/checkpoint/README.md").exists()
    assert fused["metrics"]["step_sqnr"]["mean"] != result["metrics"]["step_sqnr"]["mean"]


@pytest.mark.slow
def test_a_checkpoint_is_judged_with_it_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run on other prompts, and of the checkpoint by its folder: the figures are those of a run on these."""
    monkeypatch.chdir(tmp_path)
    path = lora(load_pipeline(jobs.short(2), device="cpu").transformer, Path("a.safetensors"))
    usual = [f"model.lora=['{path}:0.7']", "model.lora_fuse=false", *jobs.QUICK]
    kept = [*usual, f"model.path={jobs.short(2)}", "cache=cache", "eval.noise_floor=false", "protect=none"]
    kept += ["prompts.seeds=[0]", "model.batch=1"]
    text = "a blue square moving up on a white background"
    assert jobs.ptq(monkeypatch, *kept, jobs.TWO, "hydra.run.dir=both") == 0
    other = 'prompts.texts=["a red circle moving right on a black background"]'
    assert jobs.ptq(monkeypatch, *kept, other, "hydra.run.dir=run") == 0
    wanted = next(
        item["value"] for item in read_result(Path("both"))["metrics"]["psnr"]["per_item"] if item["prompt"] == text
    )

    asked = [f'prompts.texts=["{text}"]', "prompts.seeds=[0]", "prompts.name=mine", "cache=other"]
    assert jobs.run(monkeypatch, "eval", "run=run", *asked) == 0
    (item,) = read_result(Path("run"))["evaluations"]["mine"]["metrics"]["psnr"]["per_item"]
    assert item["value"] == pytest.approx(wanted, abs=0.01)

    model = ["model.path=run/checkpoint", f"reference={jobs.short(2)}", "model.batch=1", "hydra.run.dir=judged"]
    assert jobs.run(monkeypatch, "eval", *usual, *model, *asked, "eval.noise_floor=false") == 0
    result = read_result(Path("judged"))
    (item,) = result["evaluations"]["mine"]["metrics"]["psnr"]["per_item"]
    assert item["value"] == pytest.approx(wanted, abs=0.01)
    assert result["model"]["lora"][0]["fused"] is False

    fused = [word for word in usual if word != "model.lora_fuse=false"]
    assert jobs.run(monkeypatch, "eval", *fused, *model, *asked) == 1
    assert "error: model.lora: nothing can be fused into a quantized model" in capsys.readouterr().err
