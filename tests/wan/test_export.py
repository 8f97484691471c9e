"""What is exported is read back, and means what our checkpoint means."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from en_dtypes import hifloat8
from safetensors.torch import load_file

from tests import forked
from tests.wan.test_quantizer import answer, short
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig, WeightConfig
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears
from wanquant.wan.checkpoints.export import export
from wanquant.wan.checkpoints.names import to_original
from wanquant.wan.checkpoints.stream import Recipe, convert_transformer
from wanquant.wan.families import FOLDS

CONFIGS: dict[str, tuple[str, QuantConfig]] = {
    "int8": ("W8A8_DYNAMIC", QuantConfig(format="int8")),
    "int8, a step for all": ("W8A8_DYNAMIC", QuantConfig(format="int8", weights=WeightConfig("per_tensor"))),
    "int8 smoothed": ("W8A8_DYNAMIC", QuantConfig(format="int8", smoothing=0.5)),
    "int8 static": ("W8A8", QuantConfig(format="int8", activations=ActivationConfig("per_tensor", static=True))),
    "mxfp8": ("W8A8_MXFP8", QuantConfig(format="mxfp8")),
    "hif8": ("W8A8_HIFLOAT8", QuantConfig()),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind, config = CONFIGS[request.param]
    pipe, seen = short()
    quantize_(pipe.transformer, config, (0,), ("attn2.to_k",), seen, folds=FOLDS)
    return kind, save_quantized(pipe, tmp_path_factory.mktemp("made") / "saved")


def values(kind: str, found: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """The weights, as an engine takes them."""
    weight = found[f"{prefix}.weight"]
    if kind == "W8A8_MXFP8":
        assert weight.dtype == torch.float8_e4m3fn
        steps = torch.exp2(found[f"{prefix}.weight_scale"].float() - 127)
        return (weight.float().view(*steps.shape, -1) * steps[..., None]).view(weight.shape)
    if kind == "W8A8_HIFLOAT8":
        decoded = torch.from_numpy(weight.numpy().view(hifloat8).astype(np.float32))
        return decoded * found[f"{prefix}.weight_scale"]
    assert weight.dtype == torch.int8
    if kind == "W8A8":
        return weight.float() * (found[f"{prefix}.deq_scale"] / found[f"{prefix}.input_scale"])[:, None]
    assert (found[f"{prefix}.weight_offset"] == 0).all()
    assert found[f"{prefix}.weight_scale"].shape == (len(weight), 1)
    return weight.float() * found[f"{prefix}.weight_scale"]


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_mindie_sd_finds_every_linear(made: tuple[str, Path], naming: str, tmp_path: Path) -> None:
    """As its code looks for them: by ``<name>.weight`` or ``<name>.linear.weight`` in the description."""
    kind, folder = made
    export(folder / "transformer", tmp_path / "out", "mindie-sd", naming)
    found = load_file(tmp_path / "out" / f"quant_model_weight_{kind.lower()}.safetensors")
    told = json.loads((tmp_path / "out" / f"quant_model_description_{kind.lower()}.json").read_text())
    assert told["model_quant_type"] == kind
    assert told.keys() - {"model_quant_type", "version"} == found.keys()
    model = load_pipeline(folder, device="cpu").transformer
    layers = quantized_linears(model)
    for name, child in model.named_modules():
        if not isinstance(child, torch.nn.Linear):
            continue
        own = to_original(name) if naming == "original" else name
        keys = [key for key in (f"{own}.linear.weight", f"{own}.weight") if key in told]
        assert len(keys) == 1
        if name not in layers:
            assert told[keys[0]] == "FLOAT"
            assert torch.equal(found[keys[0]], child.weight)
            continue
        assert told[keys[0]] == kind
        layer, prefix = layers[name], keys[0].removesuffix(".weight")
        wanted = layer.dequantized().weight.float()
        got = values(kind, found, prefix)
        if layer.input_factor is not None:
            factor = found[f"{own}.div.mul_scale"]
            assert torch.equal(factor, layer.input_factor)
            got = got * factor
        assert (prefix == f"{own}.linear") == (layer.input_factor is not None)
        torch.testing.assert_close(got, wanted, rtol=2**-8, atol=1e-8)
        assert torch.equal(found[f"{prefix}.bias"], layer.bias.float())
        if kind == "W8A8":
            bias = found[f"{prefix}.quant_bias"] * found[f"{prefix}.deq_scale"]
            assert (bias - layer.bias).abs().max() <= 0.51 * found[f"{prefix}.deq_scale"].max()


def test_sglang_finds_every_linear(made: tuple[str, Path], tmp_path: Path) -> None:
    """As its ``ModelSlimConfig`` looks for them: by diffusers' names, in one description without a type in its name."""
    kind, folder = made
    model = load_pipeline(folder, device="cpu").transformer
    layers = quantized_linears(model)
    refused = "has not" if any(layer.input_factor is not None for layer in layers.values()) else "no hif8"
    if refused == "has not" or kind == "W8A8_HIFLOAT8":
        with pytest.raises(ValueError, match=refused):
            export(folder / "transformer", tmp_path / "out", "modelslim")
        return
    export(folder / "transformer", tmp_path / "out", "modelslim")
    found = load_file(tmp_path / "out" / WEIGHTS)
    told = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert told.keys() - {"model_quant_type", "version"} == found.keys()
    for name, child in model.named_modules():
        if not isinstance(child, torch.nn.Linear):
            continue
        assert told[f"{name}.weight"] == (kind if name in layers else "FLOAT")
        if name not in layers:
            assert torch.equal(found[f"{name}.weight"], child.weight)
            continue
        wanted = layers[name].dequantized().weight.float()
        torch.testing.assert_close(values(kind, found, name), wanted, rtol=2**-8, atol=1e-8)
        if kind == "W8A8":  # whose weights it also has a scale a row of
            torch.testing.assert_close(values("W8A8_DYNAMIC", found, name), wanted, rtol=2**-8, atol=1e-8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config  # it would come before the description


def test_in_bf16_it_is_a_plain_model_of_the_same_values(made: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = made
    export(folder / "transformer", tmp_path / "out", "bf16")
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not quantized_linears(found)
    wanted = WanTransformer3DModel.from_pretrained(folder / "transformer")
    wanted.dequantize()
    a, b = found.state_dict(), wanted.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(answer(found), answer(wanted))


def test_of_many_files_as_many_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanquant.wan.checkpoints import stream

    monkeypatch.setattr(stream, "SHARD", 200_000)
    pipe, _ = short()
    pipe.transformer.save_pretrained(tmp_path / "source")
    convert_transformer(tmp_path / "source", tmp_path / "made", Recipe(QuantConfig(), (0,)), "signed")
    ticks: list[int] = []
    export(tmp_path / "made", tmp_path / "out", "bf16", on_file=lambda: ticks.append(1))
    assert len(ticks) == len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    wanted = WanTransformer3DModel.from_pretrained(tmp_path / "made")
    wanted.dequantize()
    assert torch.equal(answer(found), answer(wanted))
    index = json.loads(next((tmp_path / "out").glob("*.index.json")).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.state_dict().values())


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return forked.run(["-m", "wanquant.export", *map(str, words)])


def test_a_pipeline_by_the_command_line(tmp_path: Path) -> None:
    pipe, _ = short()
    quantize_(pipe.transformer, QuantConfig(), (0,))
    folder = save_quantized(pipe, tmp_path / "saved")
    done = command(folder, tmp_path / "plain", "--layout", "bf16")
    assert done.returncode == 0
    assert not quantized_linears(load_pipeline(tmp_path / "plain", device="cpu").transformer)
    again = command(folder, tmp_path / "plain", "--layout", "bf16")
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
    assert "is there already" in again.stderr
    assert "holds no quantized transformer" in command(tmp_path / "plain", tmp_path / "x", "--layout", "bf16").stderr
    made = command(folder, tmp_path / "m", "--layout", "mindie-sd", "--naming", "original")
    assert (made.returncode, made.stdout.count("no engine is known")) == (0, 1)
    assert (tmp_path / "m" / "transformer" / "quant_model_weight_w8a8_hifloat8.safetensors").is_file()
    # What fails half-way leaves nothing: here the text encoder cannot be copied.
    (folder / "text_encoder" / "lost").symlink_to(tmp_path / "nowhere")
    assert command(folder, tmp_path / "half", "--layout", "bf16").returncode == 1
    assert not list(tmp_path.glob("half*"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QuantConfig(attention="qkv"), "quantize attention in other ways"),
        (QuantConfig(activations=ActivationConfig("per_tensor", static=True)), "has no static hif8"),
        (QuantConfig(format="e4m3"), "has no e4m3"),
        (QuantConfig(format="mxfp8", weights=WeightConfig(rule="amax/448")), "no scale outside of the blocks"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(config: QuantConfig, said: str, tmp_path: Path) -> None:
    pipe, seen = short()
    quantize_(pipe.transformer, config, (0,), (), seen)
    folder = save_quantized(pipe, tmp_path / "saved")
    with pytest.raises(ValueError, match=said):
        export(folder / "transformer", tmp_path / "out", "mindie-sd")
    assert not list(tmp_path.glob("out*"))
