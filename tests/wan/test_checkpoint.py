"""A packed checkpoint: half the bytes, and the same model when loaded again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.jobs import short
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear
from wanquant.runs.files import SUMS, read_sums
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import WEIGHTS
from wanquant.wan.checkpoints.find import check_folder, read_generation
from wanquant.wan.checkpoints.model_files import fingerprint
from wanquant.wan.checkpoints.sums import check_finite
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import Sample, generate

PROMPT = tiny.caption("red", "circle", "left", "black")


@pytest.fixture(scope="module")
def settings() -> GenerationConfig:
    return GenerationConfig(**{**read_generation(tiny.folder()), "steps": 1, "num_frames": 5})


def one_video(pipe: WanPipeline, settings: GenerationConfig) -> Sample:
    return generate(pipe, [(PROMPT, 3)], settings)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path: Path, settings: GenerationConfig, packed: bool) -> None:
    pipe = load_pipeline(short(), device="cpu")
    report = quantize_(pipe.transformer, QuantConfig(packed=packed), (0, 1, -3, -2, -1))
    assert report.counts() == {"converted": 30, "protected": 50, "skipped": 6}
    before = one_video(pipe, settings)
    folder = save_quantized(pipe, tmp_path / "saved")
    again = load_pipeline(folder, device="cpu")
    layer = again.transformer.blocks[3].ffn.net[2]
    assert isinstance(layer, QuantLinear)
    assert layer.weight.dtype == (torch.uint8 if packed else torch.bfloat16)
    after = one_video(again, settings)
    assert torch.equal(before.latents, after.latents)
    assert (before.video == after.video).all()
    assert not list(tmp_path.glob("*.partial"))


def test_it_loads_packed_and_with_another_product(tmp_path: Path) -> None:
    """Packed is half the memory and the same model; a checkpoint for a chip's own product runs elsewhere too."""
    pipe = load_pipeline(short(), device="cpu")
    quantize_(pipe.transformer, QuantConfig(product="exact"), (0, 1, -3, -2, -1))
    folder = save_quantized(pipe, tmp_path / "saved")
    path = folder / "transformer" / "config.json"
    described = json.loads(path.read_text())
    assert described["quantization_config"]["product"] == "exact"
    described["quantization_config"]["product"] = "native"
    path.write_text(json.dumps(described))
    layer = load_pipeline(folder, device="cpu", verify=False).transformer.blocks[3].ffn.net[2]
    x = torch.randn(4, layer.in_features).to(torch.bfloat16)
    with pytest.raises(ValueError, match="has no HiF8 matrix product of its own"):
        layer(x)
    again = load_pipeline(folder, device="cpu", packed=True, product="exact", verify=False)
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, QuantLinear):
            loaded = again.transformer.get_submodule(name)
            assert loaded.is_packed
            assert torch.equal(loaded.weight, layer.codes())
    layer, loaded = (p.transformer.blocks[3].ffn.net[2] for p in (pipe, again))
    assert torch.equal(layer(x), loaded(x))
    with pytest.raises(ValueError, match="packed and product are for a quantized model"):
        load_pipeline(short(), device="cpu", packed=True)


def test_a_checkpoint_that_was_cast_is_refused_and_an_older_one_is_not(tmp_path: Path) -> None:
    pipe = load_pipeline(short(), device="cpu")
    quantize_(pipe.transformer, QuantConfig(), (0, 1, -3, -2, -1))
    folder = save_quantized(pipe, tmp_path / "saved") / "transformer"
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]["attention"]
    (folder / "config.json").write_text(json.dumps(described))
    older = load_pipeline(tmp_path / "saved", device="cpu", verify=False)
    assert older.transformer.blocks[3].ffn.net[2].scheme.attention == "off"
    for part, key in (
        (described["quantization_config"], "format"),
        (described["quantization_config"]["weights"], "rule"),
    ):
        lost = part.pop(key)
        (folder / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=key):
            load_pipeline(tmp_path / "saved", device="cpu", verify=False)
        part[key] = lost
    (folder / "config.json").write_text(json.dumps(described))
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = "blocks.3.attn1.to_q.weight_scale"
    save_file({**tensors, name: tensors[name].bfloat16()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is torch\.bfloat16, not torch\.float32"):
        load_pipeline(tmp_path / "saved", device="cpu", verify=False)


def test_bytes_and_layout(tmp_path: Path) -> None:
    pipe = load_pipeline("tiny", device="cpu")
    source = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    config = QuantConfig(activations=ActivationConfig("per_tensor", "amax/15", True))
    linears = [name for name, child in pipe.transformer.named_modules() if isinstance(child, torch.nn.Linear)]
    report = quantize_(pipe.transformer, config, (0, -1), stats=dict.fromkeys(linears, 3.0))
    folder = save_quantized(pipe, tmp_path / "saved") / "transformer"
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    quantized = {f"{name}.weight" for name in report.names("converted")}
    packed = sum(tensor.nbytes for name, tensor in stored.items() if name in quantized)
    scales = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("_scale"))
    original = sum(source[name].nbytes for name in quantized)
    assert packed * 2 == original
    assert packed + scales < 0.53 * original
    for name in report.names("converted"):
        assert stored[f"{name}.weight"].dtype == torch.uint8
        assert stored[f"{name}.weight_scale"].dtype == torch.float32
        assert stored[f"{name}.input_scale"].item() == torch.tensor(3.0).div(15).item()
    for name, tensor in source.items():
        if name not in quantized:
            assert stored[name].dtype == tensor.dtype
            assert torch.equal(stored[name], tensor)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "wanquant"
    assert described["protected_blocks"] == [0, 39]
    assert described["modules"] == report.names("converted")
    assert described["format"] == "hif8"
    assert described["weights"] == {"granularity": "per_channel", "rule": "amax/15", "feedback": False}
    assert read_generation(folder.parent) == read_generation(tiny.folder())


def test_it_is_sharded_like_its_source(tmp_path: Path, settings: GenerationConfig) -> None:
    shutil.copytree(short(), tmp_path / "source")
    transformer = load_pipeline(short(), device="cpu").transformer
    shutil.rmtree(tmp_path / "source" / "transformer")
    transformer.save_pretrained(tmp_path / "source" / "transformer", max_shard_size="1200kB")
    pipe = load_pipeline(tmp_path / "source", device="cpu")
    quantize_(pipe.transformer, protected_blocks=(0,))
    folder = save_quantized(pipe, tmp_path / "saved")
    before, after = (
        json.loads((where / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
        for where in (tmp_path / "source", folder)
    )
    assert len(set(before.values())) == 5
    assert {name: after[name] for name in before} == before
    scales = after.keys() - before.keys()
    assert len(scales) == 70
    assert all(after[name] == before[name.removesuffix("_scale")] for name in scales)
    assert torch.equal(
        one_video(pipe, settings).latents, one_video(load_pipeline(folder, device="cpu"), settings).latents
    )


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    pipe = load_pipeline(short(), device="cpu")
    quantize_(pipe.transformer)
    with pytest.raises(FileExistsError, match="is there already"):
        save_quantized(pipe, tmp_path)


def test_nothing_quantized_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing in this pipeline is quantized"):
        save_quantized(load_pipeline(short(), device="cpu"), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_what_lies_beside_the_weights_is_not_read_and_a_wrong_module_is_named(tmp_path: Path) -> None:
    pipe = load_pipeline("tiny", device="cpu")
    quantize_(pipe.transformer)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
    folder = save_quantized(pipe, tmp_path / "saved")
    assert read_generation(folder)["flow_shift"] == 5.0
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    changed = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(changed, weights.with_name("another.safetensors"), metadata={"format": "pt"})
    bias = load_pipeline(folder, device="cpu").transformer.proj_out.bias
    assert torch.equal(bias, pipe.transformer.proj_out.bias)
    config = folder / "transformer" / "config.json"
    described = json.loads(config.read_text())
    described["quantization_config"]["modules"][0] = "blocks.0.norm1"
    config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 is a FP32LayerNorm, not a linear"):
        load_pipeline(folder, device="cpu", verify=False)


def broken(tmp_path: Path, name: str, damage: object) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(short(), folder)
    damage(folder / name)  # type: ignore[operator]
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("transformer/diffusion_pytorch_model", "blocks.3.ffn.net.2.bias"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.bias"),
        ("text_encoder/model", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_missing_tensor_is_named(tmp_path: Path, component: str, tensor: str, quantized: bool) -> None:
    """The libraries would fill it at random and go on."""
    folder = tmp_path / "model"
    if quantized:
        pipe = load_pipeline(short(), device="cpu")
        quantize_(pipe.transformer)
        save_quantized(pipe, folder)
    else:
        shutil.copytree(short(), folder)
    path = folder / f"{component}.safetensors"
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {tensor} .*missing"):
        load_pipeline(folder, device="cpu", verify=False)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "transformer/diffusion_pytorch_model.safetensors",
            truncate,
            "diffusion_pytorch_model.safetensors is truncated",
        ),
        ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "vae has no .safetensors file"),
        ("text_encoder/config.json", Path.unlink, "text_encoder/config.json is missing"),
        ("transformer/config.json", truncate, "transformer/config.json is not JSON"),
        ("vae/config.json", lambda p: p.write_text("[]"), "vae/config.json holds a list"),
        ("scheduler/scheduler_config.json", lambda p: p.write_text("{"), "scheduler_config.json is not JSON"),
        ("scheduler", shutil.rmtree, "no folder scheduler"),
        ("model_index.json", Path.unlink, "no model_index.json"),
        ("model_index.json", lambda p: p.write_text("{"), "is not JSON"),
        ("model_index.json", lambda p: p.write_text('{"_class_name": "FluxPipeline"}'), "is a FluxPipeline, not a Wan"),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, name: str, damage: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_folder(broken(tmp_path, name, damage))


def test_no_such_model() -> None:
    with pytest.raises(ValueError, match=r"no model folder \./nowhere"):
        load_pipeline("./nowhere")
    with pytest.raises(ValueError, match="cannot get nobody/nothing from the hub"):
        load_pipeline("nobody/nothing")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = load_pipeline(short(4), device="cpu")
    quantize_(pipe.transformer, QuantConfig())
    return save_quantized(pipe, tmp_path_factory.mktemp("saved") / "checkpoint")


def flip(path: Path) -> None:
    """A byte in the middle, which no loader notices by itself."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (f"transformer/{WEIGHTS}", flip, "is not what was written"),
        (f"transformer/{WEIGHTS}", truncate, "is truncated or damaged"),
        (f"vae/{WEIGHTS}", flip, "is not what was written"),
        ("text_encoder/model.safetensors", flip, "is not what was written"),
        ("transformer/config.json", lambda p: p.write_text(p.read_text().replace("amax/15", "amax/16")), "is not what"),
        ("tokenizer/tokenizer_config.json", Path.unlink, "is missing: the checkpoint is incomplete"),
        (SUMS, lambda p: p.write_text("x\n" + p.read_text()), "line 1: not a SHA-256 sum"),
    ],
)
def test_damage_is_named_by_its_file(tmp_path: Path, saved: Path, name: str, damage: Any, message: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    load_pipeline(folder, device="cpu")
    damage(folder / name)
    for load in (lambda: load_pipeline(folder, device="cpu"), lambda: (check_folder(folder), fingerprint(folder))):
        with pytest.raises(ValueError, match=f"{re.escape(str(folder / name))}.* {message}") as error:
            load()
        assert "\n" not in str(error.value)
    if damage is flip:
        load_pipeline(folder, device="cpu", verify=False)
    if damage is flip and name.startswith("transformer"):
        with pytest.raises(ValueError, match=rf"{WEIGHTS} is not what was written"):
            WanPipeline.from_pretrained(folder)


def test_the_sums_are_those_of_all_that_is_loaded(saved: Path) -> None:
    told = {path.relative_to(saved).as_posix() for path in read_sums(saved)}
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert there - told == {SUMS}
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=saved, check=False).returncode == 0


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, component: str, value: float) -> None:
    folder = shutil.copytree(short(4), tmp_path / "model")
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[7] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{component}.*: tensor {re.escape(name)} holds 1 NaN or infinite value of"):
        load_pipeline(folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_finite_is_told_by_bits_as_by_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    kind = torch.finfo(dtype)
    sound = torch.tensor([0.0, -0.0, 1.5, -2.0, kind.max, kind.min, kind.tiny, -kind.tiny], dtype=dtype)
    for tensor in (sound, sound[sound > 0], sound[sound < 0], sound[0], sound[:0], torch.arange(3)):
        check_finite({"a": tensor}, tmp_path)
    for value in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        for place in range(len(sound)):
            spoilt = sound.clone()
            spoilt[place] = value
            with pytest.raises(ValueError, match=r"tensor a holds 1 NaN or infinite value of 8"):
                check_finite({"a": spoilt.reshape(2, 4).T}, tmp_path)
