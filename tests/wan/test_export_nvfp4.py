"""NVFP4 as ComfyUI and vLLM read it, by their names, orders and formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tests.models import wan_transformer
from wanquant import quantize_
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.config import ActivationConfig, WeightConfig
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears, save_transformer
from wanquant.wan.checkpoints.export import export
from wanquant.wan.checkpoints.names import to_original

E4M3 = torch.float8_e4m3fn
W4A4 = QuantConfig(format="nvfp4", activations=ActivationConfig(static=True))
DYNAMIC = QuantConfig(format="nvfp4")
W4A8 = QuantConfig(format="nvfp4", activations=ActivationConfig(format="e4m3"))
W4A16 = QuantConfig(format="nvfp4", activations=ActivationConfig(format="bf16"))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def made(config: QuantConfig, folder: Path) -> tuple[Path, dict[str, QuantLinear]]:
    """A quantized transformer of two blocks, the first protected, and a linear of the second, in its folder."""
    torch.manual_seed(0)
    model = wan_transformer(2)
    seen = {name: 3.0 for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)}
    wide = () if config.format == "nvfp4" else ("attn.*", "ffn.net.0.proj")  # 48 wide: no two blocks of 32
    quantize_(model, config, (0,), ("attn2.to_k", *wide), seen)
    save_transformer(model, folder / "nowhere", folder / "made", lambda: None)
    return folder / "made", quantized_linears(model)


def elements(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of codes of E2M1, uint8 [out, in / 2]."""
    codes = torch.stack([first, second], dim=-1).flatten(1).long()
    return E2M1[codes & 7] * (1 - 2 * (codes >> 3))


def by_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values.view(*scale.shape, 16) * scale.float()[..., None]).view(values.shape)


@pytest.mark.parametrize("config", [W4A4, W4A16], ids=["w4a4", "w4a16"])
def test_vllm_finds_compressed_tensors(config: QuantConfig, tmp_path: Path) -> None:
    folder, layers = made(config, tmp_path)
    [said] = export(folder, tmp_path / "out", "compressed-tensors")
    assert said.startswith("vLLM joins q, k and v")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group, static = told["config_groups"]["group_0"], config.activations.static
    how = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    assert (told["format"], group["targets"]) == ("nvfp4-pack-quantized", ["Linear"])
    assert how.items() <= group["weights"].items()
    assert ("input_activations" in group) == static
    if static:
        assert how.items() <= group["input_activations"].items()
        assert group["input_activations"]["dynamic"] == "local"
    found = load_file(tmp_path / "out" / WEIGHTS)
    linears = {name for name, child in wan_transformer(2).named_modules() if isinstance(child, torch.nn.Linear)}
    assert linears - set(told["ignore"]) == layers.keys()
    ours = (
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "bias",
        *(("input_global_scale",) if static else ()),
    )
    assert len(layers) == 9
    for name, layer in layers.items():
        assert {key.rpartition(".")[2] for key in found if key.startswith(f"{name}.")} == set(ours)
        packed, scale, divisor = (found[f"{name}.{part}"] for part in ours[:3])
        assert (packed.dtype, scale.dtype, divisor.dtype) == (torch.uint8, E4M3, torch.float32)
        assert (packed.shape, scale.shape, divisor.shape) == (
            (layer.out_features, layer.in_features // 2),
            (layer.out_features, layer.in_features // 16),
            (1,),
        )
        values = by_blocks(elements(packed & 15, packed >> 4), scale)
        assert torch.equal(values.bfloat16(), layer.weight)
        assert torch.allclose(values / divisor, layer.weight.float() * layer.weight_scale, rtol=1e-6, atol=0)
        # The block of the largest magnitude has the largest scale: 448 · 6 over that magnitude is the divisor.
        assert scale.float().max() == 448
        if static:
            assert torch.allclose(found[f"{name}.input_global_scale"], torch.tensor([448 * 6 / 3.0]))


@pytest.mark.parametrize("config", [W4A4, DYNAMIC, W4A8], ids=["static", "dynamic", "w4a8"])
def test_comfyui_finds_its_own_layout(config: QuantConfig, tmp_path: Path) -> None:
    """The first of two elements in the high bits, scales in tiles as cuBLAS documents them."""
    folder, layers = made(config, tmp_path)
    said = export(folder, tmp_path / "out", "comfyui")
    inputs = config.activations.format != "e4m3"
    heads = "ComfyUI takes heads to be 128 wide, as all published Wans have them: these are 24"
    assert said == [*([] if inputs else ["inputs are not rounded there, where here they are e4m3"]), heads]
    found = load_file(tmp_path / "out" / "nvfp4.safetensors")
    assert sum(name.endswith(".comfy_quant") for name in found) == len(layers) == 9
    for own, layer in layers.items():
        name = to_original(own)
        told = json.loads(bytes(found[f"{name}.comfy_quant"].tolist()))
        assert told == {"format": "nvfp4", **({} if inputs else {"full_precision_matrix_mult": True})}
        packed, tiles, scale = (found[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
        rows, blocks = layer.out_features, layer.in_features // 16
        assert (packed.dtype, tiles.dtype, scale.dtype, scale.shape) == (torch.uint8, E4M3, torch.float32, ())
        assert tiles.shape == (-(-rows // 128) * 128, -(-blocks // 4) * 4)
        flat, wide = tiles.float().flatten(), tiles.shape[1] // 4
        place = [
            [((r // 128 * wide + b // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + b % 4 for b in range(blocks)]
            for r in range(rows)
        ]
        values = by_blocks(elements(packed >> 4, packed & 15), flat[torch.tensor(place)])
        assert torch.equal(values.bfloat16(), layer.weight)
        assert torch.equal(scale, layer.weight_scale)
        assert (f"{name}.input_scale" in found) == config.activations.static
        if layer.input_scale is not None:
            assert torch.equal(found[f"{name}.input_scale"], layer.input_scale)


def test_in_bf16_it_is_what_the_codes_mean(tmp_path: Path) -> None:
    folder, layers = made(W4A4, tmp_path)
    export(folder, tmp_path / "out", "bf16")
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not quantized_linears(plain)
    for name, layer in layers.items():
        assert torch.equal(plain.get_submodule(name).weight, layer.dequantized().weight)


REFUSED = [
    (DYNAMIC, "compressed-tensors", "compressed-tensors has a static scale of inputs: quantize with quant=nvfp4_w4a4"),
    (
        QuantConfig(format="nvfp4", weights=WeightConfig("per_channel")),
        "comfyui",
        "granularity=per_channel: .* per_ten",
    ),
    (QuantConfig(format="mxfp4"), "comfyui", "holds E4M3 and NVFP4, and not mxfp4: choose bf16"),
    (QuantConfig(format="mxfp4"), "compressed-tensors", "holds E4M3 and NVFP4, and not mxfp4: choose bf16"),
    (DYNAMIC, "mindie-sd", "layout mindie-sd has no nvfp4"),
    (DYNAMIC, "modelslim", "layout modelslim has no nvfp4"),
    (QuantConfig(format="int8", activations=ActivationConfig(format="bf16")), "modelslim", "for inputs of bf16"),
    (QuantConfig(format="nvfp4", rotation=16), "comfyui", "quant.rotation=16: layout comfyui has no place"),
    (QuantConfig(low_rank=4), "mindie-sd", "quant.low_rank=4: layout mindie-sd has no place"),
]


@pytest.mark.parametrize(("config", "layout", "said"), REFUSED)
def test_what_a_layout_cannot_hold_is_refused(config: QuantConfig, layout: str, said: str, tmp_path: Path) -> None:
    folder, _ = made(config, tmp_path)
    with pytest.raises(ValueError, match=said):
        export(folder, tmp_path / "out", layout)
    assert not list(tmp_path.glob("out*"))
