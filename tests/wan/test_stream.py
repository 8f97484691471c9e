"""From files to files a conversion writes what loading, quantizing and saving would, whatever happens to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.wan.test_names import original_names
from wanquant import load_pipeline, quantize_
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig, WeightConfig
from wanquant.quant.statistics import Layout, Observer
from wanquant.runs.files import sum_of_file
from wanquant.wan.checkpoints import stream
from wanquant.wan.checkpoints.checkpoint import (
    INDEX,
    WEIGHTS,
    load_transformer,
    quantization_of,
    quantized_linears,
    read_json,
    save_transformer,
)
from wanquant.wan.checkpoints.stream import LEDGER, Recipe, convert_transformer
from wanquant.wan.checkpoints.tensor_files import Source, file_names, write_tensors
from wanquant.wan.families import FOLDS

BLOCKS = 4
CONFIGS: dict[str, tuple[QuantConfig, tuple[int, ...], tuple[str, ...]]] = {
    "boundary": (QuantConfig(), (0, -1), ()),
    "packed": (QuantConfig(packed=True), (), ("ffn.*",)),
    "int8": (QuantConfig(name="int8", format="int8"), (1,), ()),
    "blocks of 32": (QuantConfig(name="mx", format="mxfp8"), (), ("attn2.*",)),
    "attention": (QuantConfig(attention="qkvp", weights=WeightConfig("per_tensor", "amax/16")), (0,), ()),
    "overflows": (QuantConfig(weights=WeightConfig("per_tensor", "direct"), overflow="saturate"), (), ()),
}


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    """The first blocks of tiny-wan, one weight of which is large."""
    transformer = load_pipeline("tiny", device="cpu").transformer
    transformer.blocks = torch.nn.ModuleList(list(transformer.blocks)[:BLOCKS])
    transformer.register_to_config(num_layers=BLOCKS)
    transformer.blocks[2].ffn.net[2].weight.data[0, 0] = 1e6
    return transformer


@pytest.fixture
def source(model: WanTransformer3DModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def expected(source: Path, folder: Path, recipe: Recipe) -> Path:
    model = WanTransformer3DModel.from_pretrained(source, dtype=torch.bfloat16)
    quantize_(model, recipe.config, recipe.protected_blocks, recipe.protected_modules, recipe.stats, folds=FOLDS)
    save_transformer(model, source, folder, lambda: None)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = set(read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else {WEIGHTS}
    assert {path.name for path in folder.iterdir()} == {*files, "config.json", *([INDEX] if len(files) > 1 else [])}
    return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}


def same(found: Path, wanted: Path) -> None:
    a, b = tensors_of(found), tensors_of(wanted)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    assert read_json(found / "config.json") == read_json(wanted / "config.json")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", [10**9, 300_000])
def test_it_is_what_saving_writes(
    name: str, shard: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHARD", shard)
    recipe = Recipe(*CONFIGS[name])
    read: list[int] = []
    streamed = convert_transformer(source, tmp_path / "found", recipe, "signed", read.append)
    same(tmp_path / "found", expected(source, tmp_path / "wanted", recipe))
    assert len(read) == BLOCKS + 1
    assert sum(read) == streamed.read == sum(tensor.nbytes for tensor in load_file(source / WEIGHTS).values())
    assert streamed.written == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "found").values())
    assert (tmp_path / "found" / INDEX).is_file() == (shard < 10**9)
    whole = WanTransformer3DModel.from_pretrained(source, dtype=torch.bfloat16)
    quantize_(whole, recipe.config, recipe.protected_blocks, recipe.protected_modules)
    counts = {path: int(layer.overflowed_weight) for path, layer in quantized_linears(whole).items()}
    assert streamed.overflowed == {path: count for path, count in counts.items() if count}
    assert bool(streamed.overflowed) == (name == "overflows")
    # And it loads.
    described = quantization_of(tmp_path / "found")
    assert described is not None
    loaded = load_transformer(tmp_path / "found", described)
    assert loaded.blocks[2].attn1.to_q.weight.dtype == (torch.uint8 if name == "packed" else torch.bfloat16)


@pytest.mark.parametrize("how", ["static", "smoothed"])
def test_statistics_decide_as_in_a_whole_model(how: str, source: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(source, dtype=torch.bfloat16)
    with Observer(model, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer, torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        noisy, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 16, 3, 8, 8), (1, 9, 128)))
        model(noisy, torch.tensor([500.0]), text)
    seen = {name.removesuffix(":input"): s for name, s in observer.statistics.sites.items() if name.endswith(":input")}
    static = QuantConfig(activations=ActivationConfig("per_tensor", static=True))
    config = static if how == "static" else QuantConfig(smoothing=0.5)
    recipe = Recipe(config, (1,), (), seen)
    convert_transformer(source, tmp_path / "found", recipe, "signed")
    same(tmp_path / "found", expected(source, tmp_path / "wanted", recipe))
    endings = {"static": "input_scale", "smoothed": "input_factor"}
    assert any(name.endswith(endings[how]) for name in tensors_of(tmp_path / "found"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q"):
        convert_transformer(source, tmp_path / "none", Recipe(config, (1,)), "signed")


def test_a_source_in_float32_and_in_many_files_gives_the_same(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(QuantConfig(), (0,))
    wide = WanTransformer3DModel.from_pretrained(source, dtype=torch.float32)
    wide.save_pretrained(tmp_path / "wide", max_shard_size="300kB")
    assert len(Source.of(tmp_path / "wide").files) > 3
    convert_transformer(tmp_path / "wide", tmp_path / "found", recipe, "signed")
    convert_transformer(source, tmp_path / "wanted", recipe, "signed")
    a, b = tensors_of(tmp_path / "found"), tensors_of(tmp_path / "wanted")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_file_is_what_the_library_writes(tmp_path: Path) -> None:
    """To the byte, but for how the header is spelt."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(4).bfloat16(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "step": torch.tensor(0.5),
        "turned": torch.randn(4, 6).bfloat16().T,
        "none": torch.empty(0, 3),
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    size = write_tensors(shapes, tensors.__getitem__, tmp_path / "ours")
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    files = [(tmp_path / name).read_bytes() for name in ("ours", "theirs")]
    headers = [int.from_bytes(file[:8], "little") for file in files]
    ours, theirs = (json.loads(file[8 : 8 + size]) for file, size in zip(files, headers, strict=True))
    assert ours == theirs
    assert files[0][8 + headers[0] :] == files[1][8 + headers[1] :]
    assert headers[0] % 8 == 0


def test_the_authors_own_naming_gives_the_same(source: Path, tmp_path: Path) -> None:
    """Their names, their config.json, float32 and several files, as their repositories have them."""
    tensors, described = load_file(source / WEIGHTS), read_json(source / "config.json")
    names = original_names(stream.empty_like(source))
    folder = tmp_path / "theirs"
    folder.mkdir()
    heads = described["num_attention_heads"]
    theirs = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": heads, "num_layers": BLOCKS}
    theirs |= {"dim": heads * described["attention_head_dim"], "text_dim": described["text_dim"]}
    theirs |= {"ffn_dim": described["ffn_dim"], "freq_dim": described["freq_dim"]}
    (folder / "config.json").write_text(json.dumps(theirs))
    files = file_names(2)
    where = {names[name]: files["blocks.2" in name] for name in tensors}
    for file in files:
        save_file({names[n]: t.float() for n, t in tensors.items() if where[names[n]] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    recipe = Recipe(QuantConfig(), (0,))
    convert_transformer(folder, tmp_path / "found", recipe, "signed")
    convert_transformer(source, tmp_path / "wanted", recipe, "signed")
    a, b = tensors_of(tmp_path / "found"), tensors_of(tmp_path / "wanted")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)
    found, wanted = (read_json(tmp_path / name / "config.json") for name in ("found", "wanted"))
    assert {k: v for k, v in found.items() if k != "_name_or_path"} == {
        k: v for k, v in wanted.items() if k != "_name_or_path"
    }


class Killed(BaseException):
    pass


def test_it_goes_on_behind_the_last_file_it_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHARD", 300_000)
    recipe, target = Recipe(QuantConfig(), (0,)), tmp_path / "found"
    real, written = stream.write_tensors, []

    def write(shapes: Any, fetch: Any, path: Path) -> int:
        if len(written) == 2:
            path.write_bytes(b"half")
            raise Killed
        written.append(path)
        return real(shapes, fetch, path)

    monkeypatch.setattr(stream, "write_tensors", write)
    with pytest.raises(Killed):
        convert_transformer(source, target, recipe, "signed")
    assert sorted(path.name for path in target.iterdir()) == sorted([LEDGER, *file_names(5)[:2]])
    kept = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    monkeypatch.setattr(stream, "write_tensors", real)
    read: list[int] = []
    whole = convert_transformer(source, target, recipe, "signed", read.append)
    assert len(read) == BLOCKS + 1
    assert whole.read == sum(read)
    same(target, expected(source, tmp_path / "wanted", recipe))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("changed", ["recipe or source", "file"])
def test_it_takes_nothing_up_that_is_not_its_own(
    changed: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another recipe's or source's file, nor one that is not what it had written."""
    monkeypatch.setattr(stream, "SHARD", 300_000)
    target = tmp_path / "found"
    target.mkdir()
    (target / file_names(5)[0]).write_bytes(b"another's")
    told = {"read": [1], "written": 1, "overflowed": {}, "tensors": [], "sha256": 64 * "0"}
    if changed != "file":
        told["sha256"] = sum_of_file(target / file_names(5)[0])
    known = "signed" if changed == "file" else "other"
    (target / LEDGER).write_text(json.dumps({"recipe": known, "files": {file_names(5)[0]: told}}))
    recipe = Recipe(QuantConfig(), (0,))
    streamed = convert_transformer(source, target, recipe, "signed")
    same(target, expected(source, tmp_path / "wanted", recipe))
    assert streamed.sums == {path: sum_of_file(path) for path in sorted(target.glob("*.safetensors"))}


def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors["blocks.3.attn1.to_q.bias"][5] = float("nan")
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: tensor blocks\.3\.attn1\.to_q\.bias holds 1 NaN or infinite"):
        convert_transformer(source, tmp_path / "found", Recipe(QuantConfig(), (0,)), "signed")


def test_it_refuses_before_it_writes(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "found"
    with pytest.raises(ValueError, match=r"ffn\.nothing"):
        convert_transformer(source, target, Recipe(QuantConfig(), (), ("ffn.nothing",)), "signed")
    assert not target.exists()
    convert_transformer(source, target, Recipe(QuantConfig()), "signed")
    with pytest.raises(ValueError, match="is U8, not one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2"):
        convert_transformer(target, tmp_path / "again", Recipe(QuantConfig()), "signed")
