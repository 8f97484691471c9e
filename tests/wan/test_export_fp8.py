"""FP8 as ComfyUI and vLLM read it: by their names and formulas, and by what of diffusers and transformers reads it."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear, ConvertFP8LinearScale

from tests.models import wan_transformer
from wanquant import quantize_
from wanquant.config import CONF
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.config import ActivationConfig, WeightConfig
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears, save_transformer, write_index
from wanquant.wan.checkpoints.export import export, export_all
from wanquant.wan.checkpoints.tensor_files import Source

E4M3 = torch.float8_e4m3fn
ONE_SCALE, STATIC = WeightConfig("per_tensor"), ActivationConfig("per_tensor", static=True)
CONFIGS = {
    "e4m3": QuantConfig(format="e4m3", weights=ONE_SCALE),
    "e4m3 static": QuantConfig(format="e4m3", weights=ONE_SCALE, activations=STATIC),
    "hif8": QuantConfig(weights=ONE_SCALE),
    "e4m3 by rows": QuantConfig(format="e4m3"),
    "hif8 by rows": QuantConfig(),
    "e5m2 by rows": QuantConfig(format="e5m2"),
}


def made(config: QuantConfig, folder: Path, spread: float = 0.0) -> tuple[Path, dict[str, QuantLinear]]:
    """A quantized transformer of two blocks, the first protected, and a linear of the second, in its folder.
    Magnitudes of its weights are spread over so many powers of two."""
    torch.manual_seed(0)
    model = wan_transformer(2)
    for child in model.modules():
        if spread and isinstance(child, torch.nn.Linear):
            child.weight.data *= torch.exp2(-spread * torch.rand_like(child.weight))
    seen = {name: 3.0 for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)}
    quantize_(model, config, (0,), ("attn2.to_k",), seen if config.activations.static else None)
    save_transformer(model, folder / "nowhere", folder / "made", lambda: None)
    return folder / "made", quantized_linears(model)


def dequantized(folder: Path) -> WanTransformer3DModel:
    model = WanTransformer3DModel.from_pretrained(folder)
    model.dequantize()
    return model


def same_values(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    a, b = found.state_dict(), wanted.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].bfloat16(), b[name].bfloat16()) for name in b)


@pytest.mark.parametrize("naming", ["original", "prefixed"])
@pytest.mark.parametrize("which", ["e4m3", "e4m3 static", "hif8"])
def test_comfyui_finds_a_scaled_file(which: str, naming: str, tmp_path: Path) -> None:
    """As its ``convert_old_quants`` and per-layer loader do: a linear with a ``scale_weight`` is FP8, another is not.
    What they make of it diffusers' own reader of single files takes for the model."""
    folder, layers = made(CONFIGS[which], tmp_path)
    said = export(folder, tmp_path / "out", "comfyui", naming)
    found = load_file(tmp_path / "out" / "fp8_scaled.safetensors")
    prefix = "model.diffusion_model." if naming == "prefixed" else ""
    marker = found.pop(f"{prefix}scaled_fp8")
    assert (marker.dtype, marker.numel()) == (E4M3, 0 if "static" in which else 2)
    assert any("inputs are not rounded" in line for line in said) == ("static" not in which)
    scaled = {name.removesuffix(".scale_weight") for name in found if name.endswith(".scale_weight")}
    assert len(scaled) == len(layers) == 9
    assert all(name.startswith(f"{prefix}blocks.1.") for name in scaled)
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        linear, _, part = name.rpartition(".")
        if part == "weight" and linear in scaled:
            scale = found[f"{linear}.scale_weight"]
            assert (tensor.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, ())
            plain[name] = tensor.to(torch.bfloat16) * scale
        elif part == "scale_input":
            assert torch.equal(tensor, layers["blocks.1.attn1.to_q"].input_scale)  # type: ignore[arg-type]
        elif part != "scale_weight":
            assert tensor.dtype in (torch.bfloat16, torch.float32)
            plain[name] = tensor
    assert sum(name.endswith("scale_input") for name in found) == (9 if "static" in which else 0)
    save_file(plain, tmp_path / "plain.safetensors")
    read = WanTransformer3DModel.from_single_file(
        str(tmp_path / "plain.safetensors"), config=str(tmp_path / "out"), torch_dtype=torch.bfloat16
    )
    assert same_values(read, dequantized(folder))


@pytest.mark.parametrize("which", CONFIGS)
def test_vllm_finds_compressed_tensors(which: str, tmp_path: Path) -> None:
    """``Linear`` but for the ``ignore`` list, F8_E4M3 by ``weight_scale``; and the layer that transformers has for such
    checkpoints answers as ours."""
    config = CONFIGS[which]
    folder, layers = made(config, tmp_path)
    export(folder, tmp_path / "out", "compressed-tensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["format"]) == ("compressed-tensors", "float-quantized")
    group = told["config_groups"]["group_0"]
    by_rows = "rows" in which
    assert (group["targets"], group["weights"]["strategy"]) == (["Linear"], "channel" if by_rows else "tensor")
    asked = ("tensor", False) if "static" in which else ("token", True)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == asked
    found = load_file(tmp_path / "out" / WEIGHTS)
    wanted = dequantized(folder)
    linears = {name for name, child in wanted.named_modules() if isinstance(child, torch.nn.Linear)}
    assert linears - set(told["ignore"]) == layers.keys()
    # vLLM-Omni looks for these by names of its own, into which it turns those of the tensors.
    omni = {name: re.sub(r"\.ffn\.net\.(\d)", r".ffn.net_\1", name).replace(".to_out.0", ".to_out") for name in linears}
    assert {name for name in linears if omni[name] not in told["ignore"]} == layers.keys()
    names = wanted.state_dict().keys() | {f"{name}.weight_scale" for name in layers}
    assert found.keys() == names | {f"{name}.input_scale" for name in layers if "static" in which}
    for name, child in wanted.named_modules():
        if isinstance(child, torch.nn.Linear) and name not in layers:
            assert torch.equal(found[f"{name}.weight"], child.weight)
    for name, layer in layers.items():
        weight, scale = found[f"{name}.weight"], found[f"{name}.weight_scale"]
        assert (weight.dtype, scale.shape) == (E4M3, (layer.out_features, 1) if by_rows else (1,))
        assert torch.equal((weight.float() * scale).bfloat16(), layer.dequantized().weight)
        if config.format == "e4m3":
            assert torch.equal(weight.view(torch.uint8), layer.codes())
        theirs = CompressedTensorsFP8Linear(layer.in_features, layer.out_features, True)
        holder = torch.nn.ModuleDict({"it": theirs})
        made_scale = ConvertFP8LinearScale().convert({"it.weight_scale": scale}, holder, "it.weight_scale")
        theirs.load_state_dict(
            {"weight": weight, "bias": found[f"{name}.bias"].float(), "weight_scale": made_scale["it.weight_scale"]}
        )
        theirs.bias.data = theirs.bias.data.bfloat16()
        x = torch.randn(32, layer.in_features).bfloat16()
        with torch.no_grad():
            apart = (theirs(x) - layer(x)).norm() / layer(x).norm()
        assert apart < (0.01 if config.format == "e4m3" and "static" not in which else 0.08)


def test_diffusers_refuses_compressed_tensors(tmp_path: Path) -> None:
    folder, _ = made(CONFIGS["e4m3"], tmp_path)
    export(folder, tmp_path / "out", "compressed-tensors")
    with pytest.raises(ValueError, match="compressed-tensors"):
        WanTransformer3DModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("which", ["hif8", "hif8 by rows", "e5m2 by rows"])
def test_what_carrying_loses_is_counted_and_small(which: str, tmp_path: Path) -> None:
    folder, layers = made(CONFIGS[which], tmp_path, spread=18)
    [said, _] = export(folder, tmp_path / "out", "compressed-tensors")
    counted = re.fullmatch(r"\w+ carried by e4m3: (\d+) of (\d+) weights were rounded once more", said)
    assert counted
    found, lost = load_file(tmp_path / "out" / WEIGHTS), 0
    for name, layer in layers.items():
        wanted = layer.scheme.format.decode(layer.codes(), torch.float32) * (
            layer.weight_scale[:, None] if layer.weight_scale.ndim else layer.weight_scale
        )
        error = (found[f"{name}.weight"].float() * found[f"{name}.weight_scale"] - wanted).abs()
        lost += int((error > 0).sum())
        largest = wanted.abs().amax(1, keepdim=True) if layer.weight_scale.ndim else wanted.abs().amax()
        assert (error <= largest * 2**-10 / 224).all()
        assert found[f"{name}.weight"].float().abs().amax() > 224  # the largest that fits
    assert int(counted[1]) == lost > 0
    assert int(counted[2]) == sum(layer.weight.numel() for layer in layers.values())


def test_of_many_files_as_many_are_made(tmp_path: Path) -> None:
    """Each linear whole in one of them."""
    folder, layers = made(QuantConfig(), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    halves = [{n: t for n, t in tensors.items() if n.endswith("bias") == biases} for biases in (False, True)]
    for number, half in enumerate(halves):
        save_file(half, folder / f"part-{number}.safetensors")
    (folder / WEIGHTS).unlink()
    write_index(folder, 0, {name: f"part-{number}.safetensors" for number, half in enumerate(halves) for name in half})
    export(folder, tmp_path / "out", "compressed-tensors")
    index = json.loads(next((tmp_path / "out").glob("*.index.json")).read_text())["weight_map"]
    found = {number: load_file(tmp_path / "out" / f"part-{number}.safetensors") for number in range(2)}
    assert {name: f"part-{number}.safetensors" for number, part in found.items() for name in part} == index
    assert {f"{name}.{part}" for name in layers for part in ("weight", "weight_scale", "bias")} <= found[0].keys()


def test_of_two_experts_one_may_be_plain(tmp_path: Path) -> None:
    """It is copied into a pipeline, and left out where there is a file for each quantized one."""
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    made(CONFIGS["e4m3"], tmp_path)[0].rename(pipeline / "transformer")
    wan_transformer(1).save_pretrained(pipeline / "transformer_2")
    (pipeline / "model_index.json").write_text("{}")
    said = export_all(pipeline, tmp_path / "files", "comfyui")
    assert "transformer_2 is not quantized, and was left out" in said
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["transformer"]
    assert export_all(pipeline, tmp_path / "whole", "compressed-tensors") == []
    plain = (tmp_path / "whole" / "transformer_2" / WEIGHTS).read_bytes()
    assert plain == (pipeline / "transformer_2" / WEIGHTS).read_bytes()
    assert (tmp_path / "whole" / "model_index.json").is_file()


@pytest.mark.parametrize("layout", ["comfyui", "compressed-tensors"])
def test_a_tensor_at_a_time(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made(CONFIGS["hif8"], tmp_path)
    real, alive, most = Source.read, list[weakref.ref[torch.Tensor]](), 0

    def read(self: Source, name: str) -> torch.Tensor:
        nonlocal most
        tensor = real(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(Source, "read", read)
    export(folder, tmp_path / "out", layout)
    assert len(alive) > 50
    assert most <= 3  # a weight and its scale, and what was written last


REFUSED: list[tuple[QuantConfig, str, str]] = [
    (QuantConfig(format="e4m3"), "comfyui", "granularity=per_channel: .* quantize with quant=e4m3_per_tensor"),
    (QuantConfig(), "comfyui", "quant=e4m3_per_tensor"),
    (
        QuantConfig(format="int8"),
        "compressed-tensors",
        "holds E4M3 and NVFP4, and not int8: choose mindie-sd or modelslim",
    ),
    (QuantConfig(activations=STATIC), "compressed-tensors", "static scales of hif8 are none of E4M3's: use e4m3"),
    (QuantConfig(format="e4m3"), "modelslim", "layout modelslim has no e4m3"),
]


@pytest.mark.parametrize(("config", "layout", "said"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused(config: QuantConfig, layout: str, said: str, tmp_path: Path) -> None:
    folder, _ = made(config, tmp_path)
    with pytest.raises(ValueError, match=said):
        export(folder, tmp_path / "out", layout)
    assert not list(tmp_path.glob("out*"))


def test_factors_of_smoothing_are_refused(tmp_path: Path) -> None:
    folder, layers = made(CONFIGS["e4m3"], tmp_path)
    name, layer = next(iter(layers.items()))
    factors = {f"{name}.input_factor": torch.ones(layer.in_features)}
    save_file(load_file(folder / WEIGHTS) | factors, folder / WEIGHTS)
    for layout in ("comfyui", "compressed-tensors"):
        with pytest.raises(ValueError, match=f"quant.smoothing: {name} multiplies its input by factors"):
            export(folder, tmp_path / "out", layout)


def test_a_naming_that_a_layout_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout comfyui has original or prefixed names"):
        export(tmp_path, tmp_path / "out", "comfyui", "diffusers")


def test_attention_that_the_engine_does_not_quantize_is_told(tmp_path: Path) -> None:
    folder, _ = made(QuantConfig(format="e4m3", attention="qkv"), tmp_path)
    [said] = export(folder, tmp_path / "out", "compressed-tensors")
    assert said == "attention is not quantized there (quant.attention=qkv here)"


def test_the_preset_that_is_named_fits(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    asked: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF) / "quant" / "e4m3_per_tensor.yaml"))
    folder, _ = made(QuantConfig(format=asked["format"], weights=WeightConfig(**asked["weights"])), tmp_path)
    export(folder, tmp_path / "out", "comfyui")
    assert (tmp_path / "out" / "fp8_scaled.safetensors").is_file()
