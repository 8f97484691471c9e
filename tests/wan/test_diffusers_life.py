"""What people do to a pipeline after it was quantized: the output stays exactly what it was, or it is refused in one
line that says what to do instead."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.hooks import apply_layerwise_casting
from safetensors.torch import load_file

from tests import jobs
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import QuantConfig, plan_conversion
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears

CPU = torch.device("cpu")


def answer(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 16, 2, 8, 8), (1, 9, 128)))
    with torch.no_grad():
        found: torch.Tensor = transformer(noisy, torch.tensor([500.0]), text, return_dict=False)[0]
    return found


def plain() -> Any:
    return load_pipeline(jobs.short(2), device="cpu")


def quantized(**how: Any) -> Any:
    """The second block of tiny-wan's first two."""
    pipe = plain()
    quantize_(pipe.transformer, QuantConfig(**how), (0,))
    return pipe


def lora(*blocks: int) -> dict[str, torch.Tensor]:
    generator, state = torch.Generator().manual_seed(2), {}
    for name in [f"transformer.blocks.{block}.attn{number}.to_q" for block in blocks for number in (1, 2)]:
        state[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=generator) * 0.3
        state[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=generator) * 0.3
    return state


def through_files(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    return WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)


def compiled(pipe: Any, folder: Path) -> Any:
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
    return pipe


def saved_compiled(pipe: Any, folder: Path) -> Any:
    return load_pipeline(save_quantized(compiled(pipe, folder), folder / "saved"), device="cpu")


def with_state_of(**how: Any) -> Callable[[Any, Path], Any]:
    """The state of the pipeline's transformer in one that was quantized in another form, of other weights."""

    def act(pipe: Any, folder: Path) -> Any:
        other = plain()
        with torch.no_grad():
            for parameter in other.transformer.parameters():
                parameter.mul_(0.5)
        quantize_(other.transformer, QuantConfig(**how), (0,))
        other.transformer.load_state_dict(pipe.transformer.state_dict())
        return other

    return act


def copied(pipe: Any, folder: Path) -> Any:
    pipe.transformer, original = copy.deepcopy(pipe.transformer), pipe.transformer
    original.blocks[1].ffn.net[2].weight.data.zero_()
    return pipe


def pickled(pipe: Any, folder: Path) -> Any:
    torch.save(pipe.transformer, folder / "whole")
    pipe.transformer = torch.load(folder / "whole", weights_only=False)
    return pipe


def in_place(act: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    def done(pipe: Any, folder: Path) -> Any:
        act(pipe)
        return pipe

    return done


CASTING = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}

EXACT: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": through_files,
    "save_pretrained compiled": lambda pipe, folder: through_files(compiled(pipe, folder), folder / "saved"),
    "torch.compile": compiled,
    "compile": in_place(lambda pipe: pipe.transformer.compile(backend="aot_eager")),
    "save_quantized compiled": saved_compiled,
    "load_state_dict": with_state_of(),
    "load_state_dict into packed": with_state_of(packed=True),
    "deepcopy": copied,
    "pickle": pickled,
    "enable_model_cpu_offload": in_place(lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "cpu_offload": in_place(lambda pipe: cpu_offload(pipe.transformer, CPU, offload_buffers=True)),
    "enable_group_offload": in_place(
        lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)
    ),
    "apply_layerwise_casting": in_place(lambda pipe: apply_layerwise_casting(pipe.transformer.blocks[1], **CASTING)),
    "to a device": in_place(lambda pipe: pipe.to("cpu").transformer.to(CPU)),
}


#: A compiler takes its time.
SLOW = ("torch.compile", "compile")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXACT])
def test_the_output_is_what_it_was(name: str, packed: bool, tmp_path: Path) -> None:
    pipe = quantized(packed=packed)
    before = answer(pipe.transformer)
    after = EXACT[name](pipe, tmp_path).transformer
    assert torch.equal(answer(after), before)
    assert len(quantized_linears(after)) == 10


def with_lora(pipe: Any) -> Any:
    pipe.load_lora_weights(lora(0, 1))
    return pipe


def fused(pipe: Any) -> Any:
    pipe.transformer.fuse_qkv_projections()
    return pipe


def fused_and_quantized() -> Any:
    pipe = fused(plain())
    quantize_(pipe.transformer)
    return pipe


ORIGINAL = "load the original model"
REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], Any], str]] = {
    "fuse_lora": (quantized, lambda pipe, _: with_lora(pipe).fuse_lora(), ORIGINAL),
    "fuse_qkv": (quantized, lambda pipe, _: fused(pipe), ORIGINAL),
    "unfuse_qkv": (fused_and_quantized, lambda pipe, _: pipe.transformer.unfuse_qkv_projections(), "before quantize_"),
    "save fused": (fused_and_quantized, lambda pipe, to: pipe.save_pretrained(to), "without fusing them"),
    "save_quantized fused": (fused_and_quantized, lambda pipe, to: save_quantized(pipe, to / "q"), "without fusing"),
    "save with a LoRA": (quantized, lambda pipe, to: with_lora(pipe).save_pretrained(to), "unload_lora_weights"),
    "save_quantized with a LoRA": (
        quantized,
        lambda pipe, to: save_quantized(with_lora(pipe), to / "q"),
        "unload_lora_weights",
    ),
    "layerwise casting": (
        quantized,
        lambda pipe, _: pipe.transformer.enable_layerwise_casting(**CASTING),
        "load_pipeline(folder, packed=True)",
    ),
    "to(float16)": (quantized, lambda pipe, _: pipe.to(torch.float16), "leave the dtype out"),
    "to(bfloat16)": (quantized, lambda pipe, _: pipe.transformer.to(torch.bfloat16), "leave the dtype out"),
    "to(a tensor)": (quantized, lambda pipe, _: pipe.transformer.to(torch.zeros(1)), "leave the dtype out"),
    "half": (quantized, lambda pipe, _: pipe.transformer.half(), "leave the dtype out"),
    "bfloat16": (quantized, lambda pipe, _: pipe.transformer.bfloat16(), "leave the dtype out"),
    "float": (quantized, lambda pipe, _: pipe.transformer.float(), "leave the dtype out"),
    "double": (quantized, lambda pipe, _: pipe.transformer.double(), "leave the dtype out"),
    "twice": (quantized, lambda pipe, _: quantize_(pipe.transformer), ORIGINAL),
    "beside a LoRA": (plain, lambda pipe, _: quantize_(with_lora(pipe).transformer), "load the LoRA after quantize_"),
    "compiled": (
        plain,
        lambda pipe, _: quantize_(torch.compile(pipe.transformer, backend="eager")),
        "quantize the module it was made of",
    ),
    "a BF16 state": (
        quantized,
        lambda pipe, _: pipe.transformer.load_state_dict(plain().transformer.state_dict(), strict=False),
        "load it into the plain model, then quantize_",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    make, act, instead = REFUSED[name]
    pipe = make()
    with pytest.raises(ValueError, match=re.escape(instead)) as refused:
        act(pipe, tmp_path)
    assert "\n" not in str(refused.value)


def test_the_state_of_a_quantized_model_is_refused_by_a_plain_one() -> None:
    """By torch, which is all that is asked there."""
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1\.to_q\.weight_scale"):
        plain().transformer.load_state_dict(quantized().transformer.state_dict())


@pytest.mark.slow
def test_diffusers_alone_refuses_what_was_saved(tmp_path: Path) -> None:
    """In a process that knows nothing of wanquant: the files are codes, their config says whose."""
    quantized().save_pretrained(tmp_path)
    assert load_file(tmp_path / "transformer" / WEIGHTS)["blocks.1.ffn.net.2.weight"].dtype == torch.uint8
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]["modules"]
    code = f"from diffusers import WanTransformer3DModel as W; W.from_pretrained({str(tmp_path / 'transformer')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "Unknown quantization type, got wanquant" in done.stderr.splitlines()[-1]


def test_a_lora_of_plain_linears_alone_is_fused() -> None:
    pipe = quantized()
    before, weight = answer(pipe.transformer), pipe.transformer.blocks[0].attn1.to_q.weight.clone()
    state = lora(0)
    pipe.load_lora_weights(state)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    down, up = (state[f"transformer.blocks.0.attn1.to_q.lora_{part}.weight"] for part in "AB")
    found = pipe.transformer.blocks[0].attn1.to_q.weight
    torch.testing.assert_close(found.float(), weight.float() + up @ down, rtol=0.01, atol=0.01)
    assert not torch.equal(answer(pipe.transformer), before)


def test_projections_fused_before_are_quantized_once() -> None:
    """Those that they were fused of are neither quantized nor counted; the rest is as without."""
    pipe, other = fused(plain()), plain()
    report = plan_conversion(pipe.transformer, None, (0,))
    assert report.counts() == {"converted": 7, "protected": 7, "skipped": 6 + 10}
    assert {row.name for row in report.modules if row.reason == "not in use: fused into blocks.1.attn2.to_kv"} == {
        "blocks.1.attn2.to_k",
        "blocks.1.attn2.to_v",
    }
    quantize_(pipe.transformer, None, (0,))
    quantize_(other.transformer, None, (0,))
    torch.testing.assert_close(answer(pipe.transformer), answer(other.transformer), rtol=0.02, atol=0.02)


def test_what_is_plain_again_is_a_plain_model() -> None:
    transformer = quantized().transformer
    transformer.dequantize()
    transformer.fuse_qkv_projections()
    assert transformer.to(torch.float16).dtype == torch.float16
    assert isinstance(transformer, WanTransformer3DModel)
    assert type(transformer).__name__ == "WanTransformer3DModel"
