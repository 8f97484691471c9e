"""Pipelines of two transformers (Wan2.2) in every job, as one model whose blocks are numbered through."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from tests.jobs import TWO, TWO_STEPS, ptq, short
from tests.models import wan_inputs, wan_transformer
from tests.qat.short import overrides, result_of, train
from tests.wan.pair import make_pair
from wanquant import load_pipeline
from wanquant.evaluate.single_steps import measured_now, record
from wanquant.ptq.protect import ProtectConfig, by_rule
from wanquant.ptq.sensitivity import quantized
from wanquant.quant import QuantConfig, QuantLinear, quantize_
from wanquant.runs.cache import Cache
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.checkpoints.export import export_all
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.experts import Experts, put, shape_of_whole, transformers_in, whole_of
from wanquant.wan.generate import Position, generate

PAIR = [("a red circle moving right on a black background", 0)]
SETTINGS = GenerationConfig(64, 64, 17, 4, 2.0, 3.0, 64, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its halves are not the same; of two denoising steps each makes one."""
    return make_pair(tmp_path_factory.mktemp("model") / "pair", [0, 1, 2], [3, 38, 39])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": tensor
        for name in ("transformer", "transformer_2")
        for path in sorted((folder / name).glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def test_two_equal_transformers_are_one(tmp_path: Path) -> None:
    """Bit for bit, in BF16 and with both quantized."""
    one = load_pipeline(short(4), device="cpu")
    two = load_pipeline(make_pair(tmp_path / "two", range(4), range(4)), device="cpu")
    position = Position()
    for step in ("bf16", "hif8"):
        if step == "hif8":
            quantize_(one.transformer, QuantConfig(), [0])
            quantize_(whole_of(two), QuantConfig(), [0, 4])
            assert len(quantized_linears(two.transformer)) == len(quantized_linears(two.transformer_2)) == 30
        a = generate(one, PAIR, SETTINGS, decode=False)[0].latents
        b = generate(two, PAIR, SETTINGS, decode=False, position=position)[0].latents
        assert torch.equal(a, b)
        assert position.step == SETTINGS.steps - 1


def test_each_row_is_answered_by_its_own(model: Path) -> None:
    first, second = wan_transformer(2), wan_transformer(2)
    second.load_state_dict({name: 1.5 * tensor for name, tensor in first.state_dict().items()})
    whole = Experts([first, second], 800.0)
    given = wan_inputs()
    given = {name: torch.cat([tensor, tensor]) for name, tensor in given.items()}
    given["timestep"] = torch.tensor([900.0, 100.0])
    found = whole(given["hidden_states"], given["timestep"], given["encoder_hidden_states"], return_dict=False)[0]
    for row, part in enumerate((first, second)):
        alone = part(**{name: tensor[row : row + 1] for name, tensor in given.items()}, return_dict=False)[0]
        torch.testing.assert_close(found[row : row + 1], alone)
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(whole(**given).sample, found)


def test_single_steps_of_both_are_replayed(model: Path, tmp_path: Path) -> None:
    """Bit for bit, each step by the one that made it; and what is quantized of one changes its own steps only."""
    settings = GenerationConfig(64, 64, 5, 4, 2.0, 3.0, 64, 8)
    how = (ModelConfig(generation=settings, batch=2), "pair", torch.device("cpu"), Cache(tmp_path))
    pipeline = CachedPipeline(load_pipeline(model, device="cpu"), *how)
    (along,) = record(pipeline, [*PAIR, (PAIR[0][0], 1)], 4, alone=True)
    assert (measured_now(along, lambda: None).decibels == 100.0).all()
    whole = pipeline.transformer
    parts = whole.part_of(torch.tensor(along.recording.timesteps())).tolist()
    assert set(parts) == {0, 1}
    with quantized(whole, QuantConfig(), [3, 4, 5]):
        found = measured_now(along, lambda: None).decibels.mean((0, 2))
    assert [value == 100.0 for value in found] == [part == 1 for part in parts]


def test_blocks_are_numbered_through(model: Path) -> None:
    pipe = load_pipeline(model, device="cpu")
    whole = whole_of(pipe)
    assert len(whole.blocks) == whole.config.num_layers == 6
    names = [name for name, child in whole.named_modules() if isinstance(child, torch.nn.Linear)]
    assert (
        len(names)
        == len(set(names))
        == sum(
            isinstance(child, torch.nn.Linear) for part in transformers_in(pipe).values() for child in part.modules()
        )
    )
    assert sum(p.numel() for p in whole.parameters()) == sum(
        p.numel() for part in transformers_in(pipe).values() for p in part.parameters()
    )
    other = torch.nn.Identity()
    whole.blocks[4] = other
    assert pipe.transformer_2.blocks[1] is other
    # A copy is of both, and still one.
    again = copy.deepcopy(whole)
    again.blocks[1] = other
    assert again.parts[0].blocks[1] is other
    assert pipe.transformer.blocks[1] is not other
    put(pipe, again)
    assert pipe.transformer.blocks[1] is other


def test_rules_hold_for_each_of_them() -> None:
    assert by_rule(ProtectConfig(blocks=[0, 1, -3, -2, -1]), 80, 2) == [0, 1, 37, 38, 39, 40, 41, 77, 78, 79]
    assert by_rule(ProtectConfig(blocks=[0, -1], through=True), 80, 2) == [0, -1]
    assert by_rule(ProtectConfig(by="middle", budget=2), 80, 2) == [19, 20, 59, 60]
    drawn = by_rule(ProtectConfig(by="random", budget=3), 80, 2)
    assert [index + 40 for index in drawn[:3]] == drawn[3:]


def test_both_are_quantized_and_saved(model: Path, cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A run's checkpoint makes the run's latents, and is what a conversion from files to files makes."""
    words = ["protect=ends", f"model.path={model}", "tracker=none", f"cache={cache}"]
    run = [*words, *TWO_STEPS, TWO, "eval.noise_floor=false", "prompts.seeds=[0]", f"hydra.run.dir={tmp_path / 'run'}"]
    assert ptq(monkeypatch, *run) == 0
    result = read_result(tmp_path / "run")
    assert result["model"]["blocks"] == 6
    assert result["protect"]["blocks"] == [0, 2, 3, 5]
    assert result["conversion"]["converted"] == 20
    assert result["metrics"]["latent_sqnr"]["mean"] < 100
    # Both denoised while calibration watched.
    assert all(value > 0 for value in result["calibration"]["block_absmax"])
    assert ptq(monkeypatch, "mode=convert", *words, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    made, wanted = (tensors(tmp_path / name / "checkpoint") for name in ("converted", "run"))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert read_result(tmp_path / "converted")["protect"]["blocks"] == [0, 2, 3, 5]
    pipe = WanPipeline.from_pretrained(tmp_path / "run" / "checkpoint")
    assert all(len(quantized_linears(part)) == 10 for part in transformers_in(pipe).values())
    assert all(isinstance(part.blocks[1].ffn.net[2], QuantLinear) for part in transformers_in(pipe).values())


@pytest.mark.slow
def test_what_the_data_choose_is_chosen_among_both(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = [
        f"model.path={model}",
        "tracker=none",
        f"cache={cache}",
        *TWO_STEPS,
        'calib.texts=["a red circle moving up on a gray background"]',
    ]
    chosen = ["protect=auto", "protect.by=sensitivity", "protect.budget=1"]
    assert (
        ptq(
            monkeypatch, "mode=analyze", "analysis.sensitivity=true", *chosen, *words, f"hydra.run.dir={tmp_path / 'a'}"
        )
        == 0
    )
    found = read_result(tmp_path / "a")
    assert [row["block"] for row in found["analysis"]["blocks"]] == list(range(6))
    assert len(found["protect"]["blocks"]) == 2
    assert all(row["sensitivity"] < 100 for row in found["analysis"]["blocks"])
    # The same blocks by their numbers, and statistics that a conversion shares out.
    listed = ["protect=none", f"protect.blocks={found['protect']['blocks']}", "protect.through=true"]
    convert = ["mode=convert", "quant=static_per_tensor", *listed, f"convert.statistics={tmp_path / 'a'}"]
    assert ptq(monkeypatch, *convert, *words, f"hydra.run.dir={tmp_path / 'b'}") == 0
    assert read_result(tmp_path / "b")["protect"]["blocks"] == found["protect"]["blocks"]
    run = ["quant=static_per_tensor", *listed, TWO, "eval.noise_floor=false", "prompts.seeds=[0]"]
    assert ptq(monkeypatch, *run, *words, f"hydra.run.dir={tmp_path / 'c'}") == 0
    made, wanted = (tensors(tmp_path / name / "checkpoint") for name in "bc")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blockwise", "all", "lora"])
def test_both_are_trained(scope: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = overrides(model, cache, f"qat.scope={scope}", f"hydra.run.dir={tmp_path / 'run'}", "qat.lr=1e-3")
    assert train(monkeypatch, *words) == 0
    result = result_of(tmp_path / "run")
    trained = {1, 4}
    if scope == "blockwise":
        rows = result["training"]["blocks"]
        assert [row["block"] for row in rows] == [1, 4]
        # In so few steps a block may learn nothing that is worth keeping: which ones do depends on the CPU.
        trained = {row["block"] for row in rows if row["kept"]}
    assert (result["over_untrained"]["latent_sqnr"]["mean"] != 0) == bool(trained)
    plain = tmp_path / "plain"
    convert = ["mode=convert", "protect=ends", f"model.path={model}", "tracker=none", f"cache={cache}"]
    assert ptq(monkeypatch, *convert, f"convert.to={plain}", f"hydra.run.dir={tmp_path / 'converted'}") == 0
    before, after = tensors(plain), tensors(tmp_path / "run" / "checkpoint")
    for block, name in ((1, "transformer:blocks.1.attn1"), (4, "transformer_2:blocks.1.attn1")):
        moved = any(not torch.equal(before[key], after[key]) for key in before if key.startswith(name))
        assert moved == (block in trained)


def test_what_cannot_be(model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    broken = tmp_path / "model"
    make_pair(broken, [0], [1, 2])
    words = ["tracker=none", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, *words, f"model.path={broken}") == 1
    assert "two transformers of 1 and 2 blocks: no Wan2.2" in capsys.readouterr().err
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(ValueError, match="no boundary_ratio between them"):
        shape_of_whole(broken)
    assert ptq(monkeypatch, *words, f"model.path={model}", "protect=random", "protect.through=true") == 1
    assert "protect.through=true is for a list of blocks" in capsys.readouterr().err
    assert ptq(monkeypatch, *words, "model.generation.guidance_scale_2=3") == 1
    assert "and this has one" in capsys.readouterr().err
    # Of a pair it counts: the second transformer's steps are guided otherwise.
    pipe = load_pipeline(model, device="cpu")
    found = [
        generate(pipe, PAIR, replace(SETTINGS, guidance_scale_2=g), decode=False)[0].latents for g in (None, 2.0, 3.0)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_one_of_them_protected_as_a_whole(model: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It stays as it is, in a run, a conversion, a training, an export, and where the checkpoint is used."""
    words = ["protect=none", "protect.through=true", "protect.blocks=[3,4,5]", f"model.path={model}", "tracker=none"]
    words += [f"cache={cache}", *TWO_STEPS, TWO, "eval.noise_floor=false", "prompts.seeds=[0]", "quant.attention=qkv"]
    assert ptq(monkeypatch, *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert ptq(monkeypatch, "mode=convert", *words, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    made, wanted = (tensors(tmp_path / name / "checkpoint") for name in ("converted", "run"))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    trained = overrides(model, cache, *words[:3], "qat.scope=all", f"hydra.run.dir={tmp_path / 'trained'}")
    assert train(monkeypatch, *[word for word in trained if word != "protect=ends"]) == 0
    for name in ("run", "trained"):
        pipe = load_pipeline(tmp_path / name / "checkpoint", device="cpu", packed=True)
        assert all(layer.is_packed for layer in quantized_linears(pipe.transformer).values())
        assert len(quantized_linears(pipe.transformer)) == 30
        assert not quantized_linears(pipe.transformer_2)
    export_all(tmp_path / "trained" / "checkpoint", tmp_path / "plain", "bf16", "diffusers")
    assert not quantized_linears(whole_of(load_pipeline(tmp_path / "plain", device="cpu")))


def test_thirty_blocks_are_protected_at_their_own_ends(tmp_path: Path, monkeypatch: Any) -> None:
    """As Wan2.1-T2V-1.3B has them."""
    words = ["protect=boundary", f"model.path={short(30)}", "tracker=none", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, "mode=convert", *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    result = read_result(tmp_path / "run")
    assert result["protect"]["blocks"] == [0, 1, 27, 28, 29]
    assert result["conversion"]["converted"] == 250
