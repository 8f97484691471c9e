from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import wan_inputs, wan_transformer
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig, plan_conversion, quantize_
from wanquant.quant.select import match_names, resolve_blocks
from wanquant.quant.statistics import Layout, Observer

BOUNDARY = (0, 1, -3, -2, -1)


@pytest.mark.parametrize(("blocks", "expected"), [(40, {0, 1, 37, 38, 39}), (30, {0, 1, 27, 28, 29})])
def test_boundary_on_real_depths(blocks: int, expected: set[int]) -> None:
    with torch.device("meta"):
        model = wan_transformer(blocks)
    plan = plan_conversion(model, None, BOUNDARY)
    assert set(plan.protected_blocks) == expected
    counts = plan.counts()
    assert counts == {"converted": 10 * (blocks - 5), "protected": 50, "skipped": 6}


def test_everything_else_stays_bit_identical() -> None:
    model, before = wan_transformer(6), {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize_(model, QuantConfig(), (0, -1), ("ffn.net.2",))
    changed = set(report.names("converted"))
    assert len(changed) == 4 * 9
    assert {name for name, child in model.named_modules() if isinstance(child, QuantLinear)} == changed
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in changed and leaf != "bias":
            continue
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


def test_a_shared_linear_is_refused() -> None:
    """Protected in one block and converted in another, it would be both."""
    model = wan_transformer(3)
    model.blocks[1].ffn.net[2] = model.blocks[0].ffn.net[2]
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2 is the same linear as blocks\.0\.ffn\.net\.2"):
        quantize_(model, QuantConfig(), (0,))


def test_quantized_model_runs_and_is_close() -> None:
    model = wan_transformer(4)
    inputs = wan_inputs()
    with torch.no_grad():
        reference = model(**inputs).sample.float()
        quantize_(model)
        quantized = model(**inputs).sample.float()
    error = (quantized - reference).norm() / reference.norm()
    assert 0 < error < 0.1


def test_whole_names_only() -> None:
    names = ["ffn.net.2", "ffn.net.0.proj", "attn1.to_q", "attn1.to_out.0"]
    assert match_names(["ffn.net.2"], names) == {"ffn.net.2"}
    assert match_names(["attn1.*"], names) == {"attn1.to_q", "attn1.to_out.0"}
    with pytest.raises(ValueError, match=r"pattern 'ffn' of protected modules matches nothing"):
        match_names(["ffn"], names)
    with pytest.raises(ValueError, match="not a regular expression"):
        match_names(["("], names)


def test_blocks_by_index() -> None:
    assert resolve_blocks([0, -1], 40) == (0, 39)
    with pytest.raises(ValueError, match="block 40 is out of range: the model has 40 blocks"):
        resolve_blocks([40], 40)
    with pytest.raises(ValueError, match="39 and -1 are the same"):
        resolve_blocks([39, -1], 40)


def test_refusals_leave_the_model_alone() -> None:
    model = wan_transformer(2)
    with pytest.raises(ValueError, match=r"statistics of blocks\.0\.attn1\.to_q"):
        quantize_(model, QuantConfig(activations=ActivationConfig("per_tensor", "amax/15", True)))
    with pytest.raises(ValueError, match="no list of blocks named 'layers'"):
        quantize_(model, blocks="layers")
    with pytest.raises(ValueError, match="not a list of blocks"):
        quantize_(model, blocks="proj_out")
    with pytest.raises(ValueError, match="has no HiF8 matrix product"):
        quantize_(model, QuantConfig(product="native"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q cannot be quantized to mxfp8: rows of 48"):
        quantize_(model, QuantConfig(format="mxfp8"))
    with pytest.raises(ValueError, match=r"blocks of 32, protect it"):  # no format of 8 bits has smaller ones
        quantize_(model, QuantConfig(format="mxfp8"))
    with pytest.raises(ValueError, match=r"blocks of 32, choose nvfp4$"):  # 48 and 96 are multiples of 16
        quantize_(model, QuantConfig(format="mxfp4"))
    with pytest.raises(ValueError, match=r"quant\.low_rank=60: blocks\.0\.attn1\.to_q has no more than 48"):
        quantize_(model, QuantConfig(low_rank=60))
    weight = model.blocks[1].ffn.net[2].weight
    weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2 has weights that are not finite.*int8"):
        quantize_(model, QuantConfig(format="int8"))
    weight.data[0, 0] = 1.0
    assert not any(isinstance(child, QuantLinear) for child in model.modules())
    quantize_(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model)


def test_any_module_with_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))])
    report = quantize_(model, QuantConfig(weights=WeightConfig("per_tensor")), (1,), blocks="layers")
    assert report.names("converted") == ["layers.0.0"]
    assert report.names("protected") == ["layers.1.0"]


def test_blocks_that_are_linears_and_subclasses_of_linear() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)])
    report = quantize_(model)
    assert report.names("converted") == ["blocks.0"]
    assert report.names("skipped") == ["blocks.1.out_proj"]


def test_static_statistics_come_from_the_observer() -> None:
    model, inputs = wan_transformer(2), wan_inputs()
    seen: list[torch.Tensor] = []
    probe = model.blocks[1].ffn.net[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layout = Layout(("one",), steps=1, bins=1, branches=1, full=False)
    with Observer(model, layout, lambda: (0, 0, 0)) as observer, torch.no_grad():
        model(**inputs)
        model(**inputs)
    probe.remove()
    name = "blocks.1.ffn.net.2"
    absmax = observer.statistics.input_absmax()
    assert absmax[name] == seen[0].abs().max().item()
    assert observer.statistics.rows()[name] == 2 * seen[0].shape[1]
    assert {"blocks.0:residual", "blocks.1:residual"} < set(observer.statistics.sites)
    assert not any(module._forward_pre_hooks for module in model.modules())
    config = QuantConfig(activations=ActivationConfig("per_tensor", "amax/15", True))
    quantize_(model, config, stats=absmax)
    layer = model.get_submodule(name)
    assert layer.input_scale == torch.tensor(absmax[name]) / 15
