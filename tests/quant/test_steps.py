"""Static scales by denoising step: those of calibration, and in each pass the one for its timestep."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from tests.jobs import short
from tests.models import wan_inputs, wan_transformer
from wanquant import load_pipeline, save_quantized
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, quantize_
from wanquant.quant.scheme import parse
from wanquant.quant.statistics import Layout, Observer, Site, merge
from wanquant.quant.steps import BEYOND, largest_by_bin
from wanquant.quant.trainable import Training, check_trainable
from wanquant.wan.checkpoints.export import export

TIMES = (950.0, 800.0, 600.0, 400.0, 200.0, 50.0)
#: Of three bins: halfway between 800 and 600, and between 400 and 200.
BOUNDS = [700.0, 300.0]
NAME = "blocks.1.attn2.to_v"


def config_of(steps: int, format_: str = "hif8", **more: object) -> QuantConfig:
    activations = ActivationConfig(granularity="per_tensor", static=True, steps=steps)
    return QuantConfig(format=format_, activations=activations, **more)  # type: ignore[arg-type]


def observed(model: nn.Module, given: dict[str, torch.Tensor], times: Sequence[float] = TIMES) -> dict[str, Site]:
    """Of two videos; what goes in grows from step to step."""
    parts = []
    for video in range(2):
        layout, place = Layout((str(video),), len(times), 1, 1, full=False), [0]
        with Observer(model, layout, lambda place=place: (0, place[0], 0)) as observer, torch.no_grad():
            for step, time in enumerate(times):
                place[0] = step
                model(**at(given, time, 1.0 + step + video))
        parts.append(observer.statistics)
    return merge(parts).inputs()


def at(given: dict[str, torch.Tensor], time: float, factor: float = 1.0) -> dict[str, torch.Tensor]:
    words, noisy = (given[name] * factor for name in ("encoder_hidden_states", "hidden_states"))
    return given | {"hidden_states": noisy, "encoder_hidden_states": words, "timestep": torch.full((len(noisy),), time)}


@torch.no_grad()
def output(model: nn.Module, given: dict[str, torch.Tensor], time: float) -> torch.Tensor:
    found: torch.Tensor = model(**at(given, time), return_dict=False)[0]
    return found


@pytest.mark.parametrize("format_", ["hif8", "nvfp4"])
def test_each_pass_takes_the_scale_of_its_bin(format_: str) -> None:
    """Also of timesteps that calibration has not seen, as another number of steps has them."""
    model, given = wan_transformer(2), wan_inputs()
    given = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in given.items()}
    sites = observed(model, given)
    quantized = copy.deepcopy(model)
    quantize_(quantized, config_of(3, format_), stats=sites)
    layer = quantized.get_submodule(NAME)
    assert layer.input_bounds.tolist() == BOUNDS
    by_step = sites[NAME].absmax.max((0, 2))
    rule = layer.scheme.act_rule
    wanted = rule(torch.from_numpy(by_step.reshape(3, 2).max(1)))
    assert torch.equal(layer.input_scale, wanted)
    assert len(set(wanted.tolist())) == 3
    for bin_, times in enumerate(((999.0, 701.0), (699.0, 300.0), (299.0, 0.0))):
        alone = copy.deepcopy(model)
        largest = {name: float(site.absmax.max((0, 2)).reshape(3, 2).max(1)[bin_]) for name, site in sites.items()}
        quantize_(alone, config_of(1, format_), stats=largest)
        for time in times:
            assert torch.equal(output(quantized, given, time), output(alone, given, time))


def test_a_layer_runs_in_its_transformer_only() -> None:
    model, given = wan_transformer(2), wan_inputs()
    quantize_(model, config_of(3), stats=observed(model, given))
    expected = output(model, given, 100.0)
    with pytest.raises(RuntimeError, match="runs in its transformer only"):
        model.get_submodule(NAME)(torch.randn(1, 4, 48).bfloat16())
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, given, 100.0), expected)
    assert torch.equal(output(model, given, 100.0), expected)
    assert not torch.equal(output(copied, given, 900.0), expected)


@pytest.mark.slow
def test_compiled_it_is_the_same_and_compiled_once() -> None:
    model, given = wan_transformer(2), wan_inputs()
    quantize_(model, config_of(3), stats=observed(model, given))
    expected = [output(model, given, time) for time in (900.0, 500.0, 100.0)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = output(compiled, given, 900.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [first, output(compiled, given, 500.0), output(compiled, given, 100.0)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_bin_in_which_nothing_passed_is_as_the_nearest() -> None:
    """As of Wan2.2's transformers, each of which denoises a part of the steps."""
    site = Site.empty(Layout(("v",), 8, 1, 1, full=False), 4, with_square=False)
    for step, time in ((2, 700.0), (3, 600.0), (4, 500.0)):
        site.note((0, step, 0), 10.0 + step, 1)
        site.timesteps[step] = time
    largest, bounds = largest_by_bin(site, 4)
    assert largest.tolist() == [13.0, 13.0, 14.0, 14.0]
    assert bounds.tolist() == [np.float32(BEYOND), 550.0, -np.float32(BEYOND)]
    site.timesteps[4] = 800.0
    unknown = replace(site, timesteps=np.full_like(site.timesteps, np.nan))
    with pytest.raises(ValueError, match="it has noted none"):
        largest_by_bin(unknown, 2)
    with pytest.raises(ValueError, match="timesteps that fall"):
        largest_by_bin(site, 4)


def test_a_checkpoint_keeps_scales_and_where_they_change(tmp_path: Path) -> None:
    pipe = load_pipeline(short(), "cpu")
    given = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, pipe.transformer.config.text_dim).bfloat16(),
    }
    config = config_of(3, packed=True)
    quantize_(pipe.transformer, config, range(6), stats=observed(pipe.transformer, given))
    expected = [output(pipe.transformer, given, time) for time in (900.0, 100.0)]
    save_quantized(pipe, tmp_path / "kept")
    loaded = load_pipeline(tmp_path / "kept", "cpu").transformer
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "kept", subfolder="transformer")
    for model in (loaded, theirs):
        layer = model.get_submodule("blocks.7.attn1.to_v")
        assert isinstance(layer, QuantLinear)
        ours = pipe.transformer.get_submodule("blocks.7.attn1.to_v")
        assert torch.equal(layer.input_scale, ours.input_scale)
        assert torch.equal(layer.input_bounds, ours.input_bounds)
        for time, wanted in zip((900.0, 100.0), expected, strict=True):
            assert torch.equal(output(model, given, time), wanted)
    path = tmp_path / "kept" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.7.attn1.to_v.input_bounds"]
    shutil.copytree(tmp_path / "kept", tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged" / "transformer" / path.name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blocks\.7\.attn1\.to_v\.input_bounds"):
        load_pipeline(tmp_path / "damaged", "cpu", verify=False)
    with pytest.raises(ValueError, match="steps=3: layout comfyui has one scale for all denoising steps"):
        export(tmp_path / "kept" / "transformer", tmp_path / "comfyui", "comfyui")


def test_what_it_is_not_for_is_refused() -> None:
    model, given = wan_transformer(2), wan_inputs()
    few = observed(model, given, TIMES[:2])
    for stats in ({name: site.largest() for name, site in few.items()}, few):
        with pytest.raises(ValueError, match=r"steps=3 needs, of as many steps or more, calibration statistics of bl"):
            quantize_(copy.deepcopy(model), config_of(3), stats=stats)
    with pytest.raises(ValueError, match="steps=3 cannot be trained"):
        check_trainable(parse(config_of(3)), Training())
    with pytest.raises(ValueError, match=r"set quant\.activations\.static=true"):
        parse(QuantConfig(activations=ActivationConfig(steps=3)))
    with pytest.raises(ValueError, match="mse is not found by step"):
        parse(QuantConfig(activations=ActivationConfig("per_tensor", "mse", static=True, steps=3)))
    with pytest.raises(ValueError, match=r"quant\.smoothing changes"):
        parse(config_of(3, smoothing=0.5))
    with pytest.raises(ValueError, match="must be at least 1"):
        parse(config_of(0))
