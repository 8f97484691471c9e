"""Transformers in the layouts that people have them in load to the same bits, or end in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tests.jobs import short
from tests.models import wan_inputs, wan_transformer
from tests.wan.layouts import authors_config, in_fp8, is_linear, of_fp8, renamed, write_file, write_folder
from tests.wan.test_names import THEIRS
from wanquant.quant import QuantConfig
from wanquant.wan.checkpoints.checkpoint import WEIGHTS
from wanquant.wan.checkpoints.find import find_model, shape_of
from wanquant.wan.checkpoints.model_files import fingerprint
from wanquant.wan.checkpoints.names import config_to_diffusers, to_diffusers, to_original
from wanquant.wan.checkpoints.stream import Recipe, foresee
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.load import load_pipeline, read_transformer

Tensors = dict[str, torch.Tensor]
COMFY = "model.diffusion_model."


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return wan_transformer(3)


@pytest.fixture
def like(model: WanTransformer3DModel, tmp_path: Path) -> Path:
    """A diffusers ``config.json``, as the base of a pipeline has it."""
    model.save_config(tmp_path / "like")
    return tmp_path / "like" / "config.json"


def same_model(found: WanTransformer3DModel, wanted: WanTransformer3DModel) -> None:
    a, b = found.state_dict(), wanted.state_dict()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    own = {key: value for key, value in found.config.items() if not key.startswith("_")}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in own.items()} == {
        key: list(v) if isinstance(v, tuple) else v for key, v in wanted.config.items() if not key.startswith("_")
    }
    torch.manual_seed(1)
    given = wan_inputs()
    with torch.no_grad():
        assert torch.equal(found(**given)[0], wanted(**given)[0])


@pytest.mark.parametrize("described", ["theirs", "nameless", "none"])
def test_a_folder_as_the_authors_publish_it(
    described: str, model: WanTransformer3DModel, like: Path, tmp_path: Path
) -> None:
    config: Any = authors_config(model) if described != "none" else None
    if described == "nameless":
        del config["_class_name"]
    folder = write_folder(model, tmp_path / "theirs", config)
    same_model(read_transformer(Source(folder, like if described == "none" else None)), model)


@pytest.mark.parametrize("prefix", ["", COMFY, "diffusion_model."])
@pytest.mark.parametrize("wide", [False, True])
def test_a_single_file(prefix: str, wide: bool, model: WanTransformer3DModel, like: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.float() if wide else tensor for name, tensor in renamed(model, prefix).items()}
    same_model(read_transformer(Source(write_file(tensors, tmp_path / "wan.safetensors"), like)), model)


def test_a_single_file_of_diffusers_names(model: WanTransformer3DModel, like: Path, tmp_path: Path) -> None:
    path = write_file({COMFY + name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    same_model(read_transformer(Source(path, like)), model)
    (tmp_path / "config.json").write_text(json.dumps(authors_config(model)))  # one beside it tells as well
    same_model(read_transformer(path), model)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_fp8_with_scales(
    rows: bool,
    ending: str,
    model: WanTransformer3DModel,
    like: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = in_fp8(renamed(model), rows, ending)
    tensors["blocks.0.self_attn.q.comfy_quant"] = torch.zeros(5, dtype=torch.uint8)
    source = Source(write_file(tensors, tmp_path / "wan.safetensors"), like)
    found = read_transformer(source)
    said = capsys.readouterr().err.strip()
    linears = sum(is_linear(name) for name in tensors)
    assert said.endswith(f"of 96 tensors {linears} float8_e4m3fn with scales, dequantized to BF16")
    assert source.told["dequantized"] == {"float8_e4m3fn with scales": linears}
    del tensors["blocks.0.self_attn.q.comfy_quant"]
    wanted = wan_transformer(3)
    wanted.load_state_dict({to_diffusers(name): t for name, t in of_fp8(tensors, ending).items()})
    same_model(found, wanted)
    off = (found.blocks[0].ffn.net[2].weight.float() - model.blocks[0].ffn.net[2].weight.float()).abs().max()
    assert 0 < off < 0.05 * model.blocks[0].ffn.net[2].weight.abs().max()


def test_fp8_that_was_only_cast(model: WanTransformer3DModel, like: Path, tmp_path: Path) -> None:
    tensors = {n: t.to(torch.float8_e4m3fn) if is_linear(n) else t for n, t in renamed(model, COMFY).items()}
    source = Source(write_file(tensors, tmp_path / "wan.safetensors"), like)
    weight = read_transformer(source).blocks[1].attn1.to_q.weight
    assert torch.equal(weight, tensors[f"{COMFY}blocks.1.self_attn.q.weight"].bfloat16())
    assert "float8_e4m3fn, dequantized" in source.dequantized


def test_fp8_and_strange_names_in_diffusers_own_layout(model: WanTransformer3DModel, tmp_path: Path) -> None:
    """Which diffusers would load without the scales, and without the strange."""
    model.save_config(tmp_path / "transformer")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = in_fp8(state)
    write_file(tensors, tmp_path / "transformer" / WEIGHTS)
    found = read_transformer(tmp_path / "transformer").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in of_fp8(tensors).items())
    write_file({**state, "blocks.0.strange": torch.ones(1)}, tmp_path / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match=r"tensor blocks\.0\.strange is unknown \(1 in all\)"):
        read_transformer(tmp_path / "transformer")


def write_gguf(tensors: Tensors, path: Path) -> Path:
    """As ComfyUI's: linears in blocks of 32, the rest as it is; a tensor of five dimensions by its shape beside it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        values, kind = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if is_linear(name):
            kind = gguf.GGMLQuantizationType.Q8_0
        elif tensor.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
        if values.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(like: Path, tmp_path: Path) -> None:
    """Against diffusers' own reading of the same file."""
    pytest.importorskip("gguf")
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=96, text_dim=32, freq_dim=64
    ).bfloat16()
    model.save_config(tmp_path / "base")
    path = write_gguf(renamed(model), tmp_path / "wan-Q8_0.gguf")
    source = Source(path, tmp_path / "base" / "config.json")
    found = read_transformer(source).state_dict()
    for name, tensor in load_gguf_checkpoint(path).items():
        wanted = dequantize_gguf_tensor(tensor) if hasattr(tensor, "quant_type") else tensor
        ours = found[to_diffusers(name)]
        # Theirs is rounded to float16 on the way.
        torch.testing.assert_close(ours.float(), wanted.float().view(ours.shape), rtol=2**-8, atol=1e-7)
    assert source.told["dequantized"] == {"GGUF Q8_0": 20}
    assert set(found) == set(model.state_dict())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        shape_of(cut)


def test_gguf_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"the package gguf is needed: pip install 'wanquant\[gguf\]'"):
        shape_of(tmp_path / "wan.gguf")


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def with_(**added: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in added.items()}}


ONE = torch.ones(1)
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        without("blocks.1.ffn.0.", "blocks.2.norm3"),
        r"tensor blocks\.1\.ffn\.0\.bias is missing \(4 in all\)$",
    ),
    "a last block": (without("blocks.2."), r"tensor blocks\.2\.cross_attn\.k\.bias is missing \(27 in all\)$"),
    "unknown": (
        with_(img_emb__proj__0__bias=ONE, zero=torch.zeros(1)),
        r"tensor img_emb\.proj\.0\.bias is unknown \(2 in all\)$",
    ),
    "both": (
        lambda t: with_(blocks__0__ffn__7__weight=ONE)(without("head.modulation")(t)),
        r"tensor head\.modulation is missing \(1 in all\); tensor blocks\.0\.ffn\.7\.weight is unknown \(1 in all\)$",
    ),
    "one more block": (
        lambda t: {**t, **{n.replace("blocks.2", "blocks.3"): v.clone() for n, v in t.items() if "blocks.2" in n}},
        r"tensor blocks\.3\.cross_attn\.k\.bias is unknown \(27 in all\)$",
    ),
    "half behind a prefix": (
        lambda t: {COMFY + n if n.startswith("blocks.") else n: v for n, v in t.items()},
        r"tensor model\.diffusion_model\.\S+ is missing \(\d+ in all\); tensor head\.head\.bias is unknown",
    ),
    "another shape": (
        lambda t: {**t, "blocks.1.ffn.2.bias": ONE},
        r"tensor blocks\.1\.ffn\.2\.bias is \[1\], and not \[48\]$",
    ),
    "another model": (
        lambda t: {"double_blocks.0.img_attn.qkv.weight": torch.ones(3, 3), "img_in.weight": torch.ones(3, 3)},
        r"is missing \(5 in all\); tensor double_blocks\.0\.img_attn\.qkv\.weight is unknown \(2 in all\)$",
    ),
    "a lost scale": (
        lambda t: without("blocks.1.ffn.2.scale_weight")(in_fp8(t)),
        r"tensor blocks\.1\.ffn\.2\.scale_weight is missing \(1 in all\)$",
    ),
    "a scale without weight": (
        lambda t: with_(blocks__0__ffn__1__scale_weight=ONE)(in_fp8(t)),
        r"tensor blocks\.0\.ffn\.1\.scale_weight is unknown \(1 in all\)$",
    ),
    "scales of blocks": (
        lambda t: {**in_fp8(t), "blocks.0.ffn.0.scale_weight": torch.ones(96, 2)},
        r"blocks\.0\.ffn\.0\.scale_weight is torch\.float32 \[96, 2\]: only one for the weight",
    ),
    "eight bits of another kind": (
        lambda t: {**t, "blocks.0.ffn.0.weight": torch.ones(96, 48, dtype=torch.int8)},
        r"tensor blocks\.0\.ffn\.0\.weight is I8, not one of",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_key_set_is_one_line(name: str, model: WanTransformer3DModel, like: Path, tmp_path: Path) -> None:
    damage, said = BROKEN[name]
    source = Source(write_file(damage(renamed(model)), tmp_path / "wan.safetensors"), like)
    for step in (lambda: shape_of(source), lambda: read_transformer(source)):
        with pytest.raises(ValueError, match=said) as told:
            step()
        assert str(source.path) in str(told.value)
        assert "\n" not in str(told.value)


def test_a_truncated_file_is_named(model: WanTransformer3DModel, like: Path, tmp_path: Path) -> None:
    path = write_file(renamed(model), tmp_path / "wan.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"wan\.safetensors is truncated or damaged"):
        shape_of(Source(path, like))


def test_shapes_do_not_tell_the_heads_of_a_model_that_nobody_published(
    model: WanTransformer3DModel, tmp_path: Path
) -> None:
    path = write_file(renamed(model), tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="it is 48 wide, as no published Wan"):
        shape_of(path)


def test_the_14b_by_its_shapes(tmp_path: Path) -> None:
    """Of a file of the true size, which has a header and holes: its plan reads nothing else."""
    with torch.device("meta"):
        whole = WanTransformer3DModel.from_config(config_to_diffusers(THEIRS))
    header, past = {}, 0
    for name, tensor in whole.state_dict().items():
        size = 2 * tensor.numel()
        told = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [past, past + size]}
        header[COMFY + to_original(name)], past = told, past + size
    path, text = tmp_path / "wan2.1_t2v_14B_bf16.safetensors", json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + past)
    assert path.stat().st_size > 28e9
    found = shape_of(path).config
    assert all(found[key] == value for key, value in whole.config.items() if not key.startswith("_"))
    assert foresee(path, Recipe(QuantConfig(), (0, 1, -3, -2, -1))).read == past


def test_a_pipeline_with_a_base(tmp_path: Path) -> None:
    """Which has no transformer of its own."""
    base, path = tmp_path / "base", tmp_path / "wan.safetensors"
    whole = load_pipeline(short(), device="cpu")
    shutil.copytree(short(), base, ignore=shutil.ignore_patterns("transformer"))
    write_file(renamed(whole.transformer, COMFY), path)
    (tmp_path / "config.json").write_text(json.dumps(authors_config(whole.transformer)))
    same = load_pipeline(path, device="cpu", base=base)
    a, b = same.transformer.state_dict(), whole.transformer.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert same.vae.dtype == torch.float32
    # What it is depends on its content alone, and on the rest of the pipeline.
    first = fingerprint(find_model(path, base))
    path.rename(tmp_path / "other.safetensors")
    os.utime(tmp_path / "other.safetensors", (1, 1))
    assert fingerprint(find_model(tmp_path / "other.safetensors", base)) == first
    changed = bytearray((tmp_path / "other.safetensors").read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, (1, 1))
    assert fingerprint(find_model(path, base)) != first


def test_a_base_that_is_missing_superfluous_or_another_s(model: WanTransformer3DModel, tmp_path: Path) -> None:
    path = write_folder(model, tmp_path / "theirs", authors_config(model))
    file = path / WEIGHTS
    for words, said in (
        ((file,), r"is a transformer alone: give the rest of its pipeline .* as model\.base="),
        ((path,), r"is a transformer alone"),
        ((short(), "tiny"), r"is no transformer alone: leave model\.base=tiny out"),
        ((tmp_path / "none.safetensors", "tiny"), "there is no file"),
        ((path / "config.json", "tiny"), r"only \.safetensors and \.gguf files are read"),
        ((file, tmp_path / "nowhere"), "no model folder .*nowhere"),
        ((file, "tiny"), r"text_encoder has d_model=128, and the transformer text_dim=32"),
        ((file, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"), "has 2 transformers, and .* is 1"),
    ):
        with pytest.raises(ValueError, match=said):
            find_model(*words, shapes_only=True)
    assert find_model(file, shapes_only=True, alone=True).folder == file


def test_both_transformers_in_one_folder(model: WanTransformer3DModel, tmp_path: Path) -> None:
    """As the authors publish Wan2.2."""
    for name in ("high_noise_model", "low_noise_model"):
        write_folder(model, tmp_path / "theirs" / name, {**authors_config(model), "text_dim": 32})
    base = tmp_path / "base"
    for part, told in (("text_encoder", {"d_model": 32}), ("vae", {"z_dim": 16}), ("scheduler", {}), ("tokenizer", {})):
        (base / part).mkdir(parents=True)
        (base / part / "config.json").write_text(json.dumps(told))
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "W"], "transformer_2": ["diffusers", "W"]}
    (base / "model_index.json").write_text(json.dumps(index))
    found = find_model(tmp_path / "theirs", base, shapes_only=True)
    assert [part.path.name for part in found.transformers.values()] == ["high_noise_model", "low_noise_model"]
    assert list(found.transformers) == ["transformer", "transformer_2"]
    assert load_file(found.transformers["transformer"].files[0]).keys() == renamed(model).keys()
