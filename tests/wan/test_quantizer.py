"""diffusers loads what we write, and writes it again; what is damaged it refuses, though diffusers itself would not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.quantizers import auto
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests import jobs
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.config import ActivationConfig
from wanquant.quant.statistics import Layout, Observer
from wanquant.registered import register
from wanquant.runs.files import SUMS
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears
from wanquant.wan.checkpoints.stream import Recipe, convert_transformer
from wanquant.wan.families import FOLDS

CONFIGS = {
    "default": QuantConfig(),
    "packed": QuantConfig(packed=True),
    "static": QuantConfig(activations=ActivationConfig("per_tensor", static=True)),
    "smoothed": QuantConfig(smoothing=0.5),
    "attention": QuantConfig(attention="qkvp"),
    "blocks of 32": QuantConfig(format="mxfp8"),
}


def asked() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 16, 3, 8, 8), (2, 9, 128)))
    return {"hidden_states": noisy, "timestep": torch.tensor([900.0, 20.0]), "encoder_hidden_states": text}


def answer(transformer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = transformer(**asked(), return_dict=False)[0]
    return found


def short() -> Any:
    """The first four blocks of tiny-wan, and what their linears see."""
    pipe = load_pipeline(jobs.short(4), device="cpu")
    with Observer(pipe.transformer, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer:
        answer(pipe.transformer)
    sites = observer.statistics.sites
    return pipe, {name.removesuffix(":input"): site for name, site in sites.items() if name.endswith(":input")}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, seen = short()
    quantize_(pipe.transformer, CONFIGS[request.param], (0,), (), seen, folds=FOLDS)
    return save_quantized(pipe, tmp_path_factory.mktemp("saved") / request.param.replace(" ", "-"))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_it_is_what_load_pipeline_loads(saved: Path) -> None:
    found = WanTransformer3DModel.from_pretrained(saved / "transformer")
    wanted = load_pipeline(saved, device="cpu").transformer
    assert same(state(found), state(wanted))
    assert quantized_linears(found).keys() == quantized_linears(wanted).keys()
    assert len(quantized_linears(found)) == 30
    assert torch.equal(answer(found), answer(wanted))
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("size", ["10GB", "200kB"])
def test_it_is_written_again_as_it_was(saved: Path, tmp_path: Path, size: str) -> None:
    found = WanTransformer3DModel.from_pretrained(saved / "transformer")
    found.save_pretrained(tmp_path / "again", max_shard_size=size)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 3 if size == "200kB" else len(files) == 1
    again = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert same(again, load_file(saved / "transformer" / WEIGHTS))
    a, b = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", saved / "transformer"))
    assert a["quantization_config"] == b["quantization_config"]
    assert same(state(WanTransformer3DModel.from_pretrained(tmp_path / "again")), state(found))


def test_the_whole_pipeline_loads_and_is_saved(tmp_path: Path) -> None:
    pipe, _ = short()
    quantize_(pipe.transformer, QuantConfig(), (0,))
    folder = save_quantized(pipe, tmp_path / "saved")
    found = WanPipeline.from_pretrained(folder)
    assert torch.equal(answer(found.transformer), answer(pipe.transformer))
    assert found.vae.dtype == torch.float32
    found.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again", device="cpu")
    assert same(state(again.transformer), state(found.transformer))


def test_a_streamed_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanquant.wan.checkpoints import stream

    monkeypatch.setattr(stream, "SHARD", 200_000)
    pipe, _ = short()
    pipe.transformer.save_pretrained(tmp_path / "source")
    convert_transformer(tmp_path / "source", tmp_path / "made", Recipe(QuantConfig(packed=True), (0,)), "signed")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 2
    found = WanTransformer3DModel.from_pretrained(tmp_path / "made")
    assert found.blocks[1].ffn.net[2].weight.dtype == torch.uint8
    quantize_(pipe.transformer, QuantConfig(), (0,))
    assert torch.equal(answer(found), answer(pipe.transformer))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    pipe, _ = short()
    quantize_(pipe.transformer, QuantConfig(), (0,))
    folder = save_quantized(pipe, tmp_path / "saved")
    (folder / SUMS).unlink()  # as of one that was made anew
    return folder / "transformer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("blocks.1.ffn.net.2.weight_scale"), "weight_scale is missing"),
        (lambda tensors: tensors.pop("blocks.1.norm2.weight"), r"blocks\.1\.norm2\.weight is missing"),
        (
            lambda tensors: tensors.update(
                {"blocks.1.ffn.net.2.weight_scale": tensors["blocks.1.ffn.net.2.weight_scale"].bfloat16()}
            ),
            "something has cast this checkpoint",
        ),
    ],
)
def test_a_damaged_one_is_refused(damaged: Path, change: Any, said: str) -> None:
    tensors = load_file(damaged / WEIGHTS)
    change(tensors)
    save_file(tensors, damaged / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=said):
        WanTransformer3DModel.from_pretrained(damaged)


def test_what_it_cannot_be_is_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a quantized transformer is in torch\.bfloat16"):
        WanTransformer3DModel.from_pretrained(damaged, dtype=torch.float16)
    described = json.loads((damaged / "config.json").read_text())
    del described["quantization_config"]["overflow"]
    (damaged / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has lost, or this version does not know, overflow"):
        WanTransformer3DModel.from_pretrained(damaged)


def test_adapters_load_on_top(damaged: Path, tmp_path: Path) -> None:
    """A LoRA trained on the BF16 model, through diffusers' own loader."""
    other = short()[0].transformer
    other.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "ffn.net.2"]))
    torch.manual_seed(0)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    kept = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(other).items()}
    save_file(kept, tmp_path / "lora.safetensors")
    pipe = WanPipeline.from_pretrained(damaged.parent)
    before = answer(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    layer = pipe.transformer.blocks[1].attn1.to_q
    assert isinstance(layer.base_layer, QuantLinear)
    after = answer(pipe.transformer)
    assert not torch.equal(after, before)
    x = torch.randn(5, 128).bfloat16()
    a, b = (kept[f"transformer.blocks.1.attn1.to_q.lora_{part}.weight"] for part in "AB")
    own = layer.base_layer(x).float() + x.float() @ a.float().T @ b.float().T
    torch.testing.assert_close(layer(x).float(), own, rtol=0.02, atol=0.02)
    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe.transformer), before)


def test_registering_after_diffusers_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has imported diffusers: the two dictionaries get their entries, and keep the others."""
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        before = dict(mapping)
        monkeypatch.delitem(mapping, "wanquant")
        register()
        register()
        assert mapping.keys() == before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["wanquant", "diffusers", "diffusers.quantizers"])
def test_it_does_not_matter_which_is_imported_first(first: str, damaged: Path) -> None:
    code = f"import {first}, wanquant; from diffusers import WanTransformer3DModel as W; "
    code += f"print(type(W.from_pretrained({str(damaged)!r}).blocks[1].ffn.net[2]).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["QuantLinear"]


def test_importing_wanquant_imports_no_other() -> None:
    light = "import wanquant, sys; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_load_pipeline_loads_is_diffusers_own_too(other: bool, saved: Path, tmp_path: Path) -> None:
    """It is saved as the codes it was, and dequantized: packed and not by turns, or the ``other`` way."""
    packed = (saved.name in ("default", "static", "attention")) != other
    pipe = load_pipeline(saved, device="cpu", packed=packed)
    pipe.save_pretrained(tmp_path / "again")
    first, second = (load_pipeline(folder, device="cpu").transformer for folder in (saved, tmp_path / "again"))
    a, b = quantized_linears(first), quantized_linears(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].codes(), b[name].codes()) for name in a)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    pipe.transformer.dequantize()
    assert not quantized_linears(pipe.transformer)
    pipe.save_pretrained(tmp_path / "plain")
    assert not quantized_linears(load_pipeline(tmp_path / "plain", device="cpu").transformer)


def test_dequantized_it_is_a_plain_model(saved: Path, tmp_path: Path) -> None:
    """Whose weights are what the codes mean, and that is saved as any other."""
    found = WanTransformer3DModel.from_pretrained(saved / "transformer")
    layers = {name: layer.dequantized() for name, layer in quantized_linears(found).items()}
    found.dequantize()
    assert not quantized_linears(found)
    for name, layer in layers.items():
        assert torch.equal(found.get_submodule(name).weight, layer.weight)
    quantized = load_pipeline(saved, device="cpu").transformer
    error = (answer(found).float() - answer(quantized).float()).norm() / answer(quantized).float().norm()
    assert error < 0.1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "from disk"])
def test_it_runs_group_by_group(kind: str, packed: bool, tmp_path: Path) -> None:
    """By diffusers' own hooks; on a CPU they move nothing anywhere, but take every tensor and put it back."""
    transformer = short()[0].transformer
    quantize_(transformer, QuantConfig(packed=packed), (0,))
    before = answer(transformer)
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    how: dict[str, Any] = {"offload_type": "leaf_level" if kind == "from disk" else kind}
    how |= {"offload_to_disk_path": str(tmp_path / "groups")} if kind == "from disk" else {"num_blocks_per_group": 1}
    transformer.enable_group_offload(**where, **how)
    assert torch.equal(answer(transformer), before)


def test_it_runs_from_the_disk(damaged: Path, tmp_path: Path) -> None:
    """By accelerate's own hooks, one layer in memory at a time."""
    found = WanTransformer3DModel.from_pretrained(damaged)
    before = answer(found)
    disk_offload(found, str(tmp_path / "offloaded"), execution_device=torch.device("cpu"), offload_buffers=True)
    assert found.blocks[1].ffn.net[2].weight.is_meta
    assert torch.equal(answer(found), before)
    shutil.rmtree(tmp_path / "offloaded")
