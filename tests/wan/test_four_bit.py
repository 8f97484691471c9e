"""Formats of four and six bits in files: what is promised of their size, and nothing lost on any way there and back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from benchmarks.random_wan import make
from tests.jobs import QUICK, TWO, ptq, run
from tests.models import wan_transformer
from tests.test_config import composed
from wanquant import load_pipeline, quantize_
from wanquant.config import CONF
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear
from wanquant.quant.scheme import parse
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.checkpoint import (
    WEIGHTS,
    load_transformer,
    quantization_of,
    quantized_linears,
    save_transformer,
)
from wanquant.wan.checkpoints.quantizer import dequantize_
from wanquant.wan.checkpoints.stream import Recipe, convert_transformer, foresee
from wanquant.wan.device import forget_peak_memory, peak_memory
from wanquant.wan.families import FOLDS

CPU = torch.device("cpu")
NAMES = sorted(path.stem for path in (Path(CONF) / "quant").glob("*_w[46]a*.yaml"))
#: Bits a weight with the scales of its blocks.
BITS = {"nvfp4": 4.5, "mxfp4": 4.25, "mxfp6": 6.25, "hif4": 4.5, "int4_g64": 4.25, "int4_g128": 4.125}


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    """The first two blocks of tiny-wan, 128 wide."""
    transformer = load_pipeline("tiny", device="cpu").transformer
    transformer.blocks = torch.nn.ModuleList(list(transformer.blocks)[:2])
    transformer.register_to_config(num_layers=2)
    return transformer


def asked() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 16, 2, 8, 8), (1, 9, 128)))
    return {"hidden_states": noisy, "timestep": torch.tensor([900.0]), "encoder_hidden_states": text}


@torch.no_grad()
def answer(transformer: Any) -> torch.Tensor:
    found: torch.Tensor = transformer(**asked(), return_dict=False)[0]
    return found


def recipe_of(model: torch.nn.Module, config: QuantConfig) -> Recipe:
    """The first block protected; inputs up to 4 where their scale is static."""
    linears = [name for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)]
    return Recipe(config, (0,), (), dict.fromkeys(linears, 4.0) if config.activations.static else None)


def test_there_are_all_of_them() -> None:
    assert len(NAMES) == 11
    assert {composed(f"quant={name}").quant.format for name in NAMES} == BITS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_in_files(name: str, model: WanTransformer3DModel, tmp_path: Path) -> None:
    """Saved as it lies in memory, packed or not, and streamed, it is one checkpoint; every loader makes the same."""
    config = composed(f"quant={name}").quant
    recipe, quantized = recipe_of(model, config), copy.deepcopy(model)
    model.save_pretrained(tmp_path / "source")
    quantize_(quantized, config, recipe.protected_blocks, (), recipe.stats)
    save_transformer(quantized, tmp_path / "source", tmp_path / "saved", lambda: None)
    streamed = convert_transformer(tmp_path / "source", tmp_path / "streamed", recipe, "signed")
    saved, found = (load_file(tmp_path / folder / WEIGHTS) for folder in ("saved", "streamed"))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[key], found[key]) and saved[key].dtype == found[key].dtype for key in saved)
    # Of the size that is promised.
    bits = BITS[config.format]
    for path, layer in quantized_linears(quantized).items():
        weight, scale = saved[f"{path}.weight"], saved[f"{path}.weight_scale"]
        assert (weight.dtype, scale.dtype) == (torch.uint8, torch.float32)
        assert 8 * weight.nbytes == bits * layer.in_features * layer.out_features
        assert weight.nbytes + scale.nbytes == parse(config).packed_bytes(layer)
        assert (f"{path}.input_scale" in saved) == config.activations.static
    assert len(quantized_linears(quantized)) == 10
    total = sum(tensor.nbytes for tensor in saved.values())
    static = 40 if config.activations.static else 0
    assert streamed.written == total == foresee(tmp_path / "source", recipe).written + static
    # And the same whoever loads it.
    described, wanted = quantization_of(tmp_path / "saved"), answer(quantized)
    assert described is not None
    packed = load_transformer(tmp_path / "saved", described, packed=True)
    assert all(layer.is_packed for layer in quantized_linears(packed).values())
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    for other in (load_transformer(tmp_path / "saved", described), packed, theirs):
        assert torch.equal(answer(other), wanted)
    theirs.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)


@pytest.mark.parametrize("how", [{"rotation": 32}, {"low_rank": 8}, {"rotation": 16, "low_rank": 4}])
def test_what_methods_keep_beside_weights_is_in_files(
    how: dict[str, int], model: WanTransformer3DModel, tmp_path: Path
) -> None:
    config, quantized = QuantConfig(format="hif4", **how), copy.deepcopy(model)
    model.save_pretrained(tmp_path / "source")
    quantize_(quantized, config, (0,), folds=FOLDS)
    save_transformer(quantized, tmp_path / "source", tmp_path / "saved", lambda: None)
    recipe = Recipe(config, (0,), (), None)
    streamed = convert_transformer(tmp_path / "source", tmp_path / "streamed", recipe, "signed")
    saved, found = (load_file(tmp_path / folder / WEIGHTS) for folder in ("saved", "streamed"))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[key], found[key]) for key in saved)
    kept = sum(tensor.nbytes for key, tensor in saved.items() if key.endswith(".input_signs"))
    assert (kept > 0) == ("rotation" in how)
    assert streamed.written == foresee(tmp_path / "source", recipe).written + kept
    described, wanted = quantization_of(tmp_path / "saved"), answer(quantized)
    assert described is not None
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    for other in (load_transformer(tmp_path / "saved", described), theirs):
        assert torch.equal(answer(other), wanted)
    # Plain linears of the same meaning differ by the rounding of inputs, and of weights to BF16.
    dequantize_(quantized)
    assert not quantized_linears(quantized)
    assert float((answer(quantized) - wanted).float().norm() / wanted.float().norm()) < 0.3


@pytest.mark.parametrize("name", ["nvfp4_w4a4", "hif4_w4a4", "int4_w4a16", "mxfp6_w6a6"])
def test_state_dicts_and_what_the_codes_mean(name: str, model: WanTransformer3DModel) -> None:
    config = composed(f"quant={name}").quant
    recipe, quantized = recipe_of(model, config), copy.deepcopy(model)
    quantize_(quantized, config, recipe.protected_blocks, (), recipe.stats)
    other = copy.deepcopy(model)
    for child in other.blocks[1].modules():
        if isinstance(child, torch.nn.Linear):
            child.weight.data.zero_()
    quantize_(other, composed(f"quant={name}", "quant.packed=true").quant, (0,), (), recipe.stats)
    wanted = answer(quantized)
    other.load_state_dict(quantized.state_dict())
    assert all(layer.is_packed for layer in quantized_linears(other).values())
    assert torch.equal(answer(other), wanted)
    quantized.load_state_dict(other.state_dict())
    assert torch.equal(answer(quantized), wanted)
    layer = quantized.blocks[1].ffn.net[0].proj
    assert isinstance(layer, QuantLinear)
    meant = (layer.weight.float() * layer.weight_scale).bfloat16()
    source = model.blocks[1].ffn.net[0].proj.weight.float()
    assert 0 < (meant.float() - source).norm() < 0.2 * source.norm()
    dequantize_(other)
    plain = other.blocks[1].ffn.net[0].proj
    assert type(plain) is torch.nn.Linear
    assert torch.equal(plain.weight, meant)


def test_a_weight_of_another_size_is_refused(model: WanTransformer3DModel, tmp_path: Path) -> None:
    """By both loaders, in one line, also where torch would take it."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, QuantConfig(format="mxfp4"), (0,))
    save_transformer(quantized, tmp_path, tmp_path / "saved", lambda: None)
    tensors, name = load_file(tmp_path / "saved" / WEIGHTS), "blocks.1.attn1.to_q.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "saved" / WEIGHTS, metadata={"format": "pt"})
    said = rf"tensor {name} has shape \(128, 67\), not \(128, 68\)"
    described = quantization_of(tmp_path / "saved")
    assert described is not None
    with pytest.raises(ValueError, match=said):
        load_transformer(tmp_path / "saved", described)
    with pytest.raises(ValueError, match=said):
        WanTransformer3DModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QuantConfig(format="hif4"), "rows of 48 elements do not divide into blocks of 64, choose nvfp4"),
        (QuantConfig(format="mxfp6"), "blocks of 32, protect it (protect.modules) or choose a format without blocks"),
        (
            QuantConfig(activations=ActivationConfig(format="int4_g128")),
            "rows of 48 elements do not divide into blocks of 128, choose nvfp4",
        ),
    ],
)
def test_a_width_that_does_not_divide_names_what_would_fit(config: QuantConfig, said: str) -> None:
    """Before anything is changed, also of a format for inputs."""
    transformer = wan_transformer(1)
    with pytest.raises(ValueError, match=f"blocks.0.attn1.to_q cannot be quantized to .*{re.escape(said)}$"):
        quantize_(transformer, config)
    assert not quantized_linears(transformer)


def test_packing_a_weight_of_the_14b_takes_little_beside_it() -> None:
    """Of its true width, 13,312 rows of 5120, and in BF16: a byte a weight for the codes, and what they become."""
    scheme = parse(QuantConfig(format="nvfp4"))
    weight = scheme.quantize_weight(torch.randn(1024, 5120).bfloat16())[0].repeat(13, 1)
    forget_peak_memory(CPU)
    begun = peak_memory(CPU)
    packed = scheme.format.pack(weight)
    assert packed.nbytes == 13312 * 2880
    assert peak_memory(CPU) - begun < 3 * weight.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["nvfp4", "hif4"])
def test_blocks_of_the_14b_are_converted_within_3_gb(format_: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "14b", 2) / "transformer"
    recipe = Recipe(QuantConfig(format=format_))
    needs = foresee(model, recipe)
    forget_peak_memory(CPU)
    begun = peak_memory(CPU)
    streamed = convert_transformer(model, tmp_path / "made", recipe, "signed")
    took = peak_memory(CPU) - begun
    assert took < min(3e9, 1.05 * needs.memory)
    assert streamed.written == needs.written
    linears = sum(tensor.nbytes for name, tensor in _stored(tmp_path / "made") if tensor.dtype == torch.uint8)
    assert 8 * linears == 4.5 * needs.quantized


def _stored(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return [item for path in sorted(folder.glob("*.safetensors")) for item in load_file(path).items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svdquant_nvfp4", "hif4_rotated", "int4_w4a16"])
def test_jobs_of_methods(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated, generated with, saved, and evaluated from the checkpoint."""
    words = ["tracker=none", f"cache={tmp_path / 'cache'}", TWO, "prompts.seeds=[0]", "eval.noise_floor=false", *QUICK]
    words += ["calib.texts=[a red circle moving up on a gray background]", "calib.seeds=[0]", "protect=none"]
    assert ptq(monkeypatch, f"quant={name}", *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    result = read_result(tmp_path / "run")
    assert result["conversion"]["converted"] == 80
    assert 5 < result["metrics"]["step_sqnr"]["mean"] < 60
    evaluated = [f"run={tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'evaluated'}", "tracker=none"]
    assert run(monkeypatch, "eval", *evaluated) == 0


@pytest.mark.slow
def test_jobs_of_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated with, saved, evaluated; and converted by the statistics of an analysis to the same checkpoint."""
    words = ["tracker=none", f"cache={tmp_path / 'cache'}", TWO, "prompts.seeds=[0]", "eval.noise_floor=false", *QUICK]
    words += ["calib.texts=[a red circle moving up on a gray background]", "calib.seeds=[0]"]
    for name in ("nvfp4_w4a4", "hif4_w4a4"):
        assert ptq(monkeypatch, f"quant={name}", *words, f"hydra.run.dir={tmp_path / name}") == 0
        result = read_result(tmp_path / name)
        assert result["status"] == "ok"
        assert result["conversion"] == {"converted": 30, "protected": 50, "skipped": 6}
        assert result["quant"]["format"] == name.partition("_")[0]
        assert 10 < result["metrics"]["step_sqnr"]["mean"] < 60
        assert name in (tmp_path / name / "report.html").read_text()
        saved = tmp_path / name / "checkpoint"
        assert len(quantized_linears(load_pipeline(saved, device="cpu").transformer)) == 30
    evaluated = [f"run={tmp_path / 'hif4_w4a4'}", f"hydra.run.dir={tmp_path / 'evaluated'}", "tracker=none"]
    assert run(monkeypatch, "eval", *evaluated) == 0
    assert ptq(monkeypatch, "mode=analyze", *words, f"hydra.run.dir={tmp_path / 'analysis'}") == 0
    convert = ["mode=convert", "quant=nvfp4_w4a4", *words, f"convert.statistics={tmp_path / 'analysis'}"]
    assert ptq(monkeypatch, *convert, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    found, wanted = (
        dict(_stored(tmp_path / name / "checkpoint" / "transformer")) for name in ("converted", "nvfp4_w4a4")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
