from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from wanquant.formats.registry import get_format
from wanquant.quant import ActivationConfig, QuantConfig, WeightConfig, quantize_
from wanquant.quant.scale import (
    TARGETED,
    AmaxTo,
    Direct,
    PerRow,
    PerTensor,
    PowerOfTwo,
    parse_rule,
    register_scale_rule,
)
from wanquant.quant.scheme import parse, parse_granularity
from wanquant.quant.trainable import TrainableQuantLinear, Training

INF, NAN = float("inf"), float("nan")
HIF8 = get_format("hif8")


def test_rules_parse_to_their_classes() -> None:
    assert parse_rule("direct", HIF8) == Direct()
    assert parse_rule("amax", HIF8) == parse_rule("amax/15", HIF8) == AmaxTo(15.0)
    assert parse_rule("pow2", HIF8) == PowerOfTwo(15.0)
    assert parse_rule("pow2/16", HIF8) == PowerOfTwo(16.0)
    assert parse_granularity("per_channel", "per_channel") == PerRow()
    assert parse_granularity("per_tensor", "per_token") == PerTensor()


@pytest.mark.parametrize("text", ["amax/", "amax/x", "amax/0", "amax/-1", "direct/2", "max/15", ""])
def test_a_wrong_rule_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="scale rule"):
        parse_rule(text, HIF8)


def test_amax_puts_the_largest_on_the_target() -> None:
    scale = AmaxTo(15.0)(torch.tensor([30.0, 1.5]))
    assert torch.equal(scale, torch.tensor([2.0, 0.1]))


def test_power_of_two_is_the_smallest_that_fits() -> None:
    absmax = torch.cat([torch.rand(1000) * 100 + 1e-6, torch.tensor([15.0, 30.0, 7.5, 15.000001])])
    scale = PowerOfTwo(15.0)(absmax)
    exponents = torch.log2(scale.double())
    assert torch.equal(exponents, exponents.round())
    assert (absmax / scale <= 15.0).all()
    assert (absmax / (scale / 2) > 15.0).all()
    assert PowerOfTwo(15.0)(torch.tensor(15.0)).item() == 1.0


@pytest.mark.parametrize("rule", [Direct(), AmaxTo(15.0), PowerOfTwo(15.0)])
def test_zero_gives_one_and_a_broken_slice_gives_nan(rule: object) -> None:
    scale = rule(torch.tensor([0.0, INF, NAN, 1e-45]))  # type: ignore[operator]
    assert scale[0] == 1.0
    assert math.isnan(scale[1])
    assert math.isnan(scale[2])
    assert scale[3] > 0


@pytest.fixture
def halves() -> Iterator[str]:
    """A rule as a plug-in brings it: a function, and nothing more."""

    def make(target: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda absmax: AmaxTo(target)(absmax) / 2

    register_scale_rule("halves", make)
    yield "halves"
    del TARGETED["halves"]


def test_a_plug_in_adds_a_rule(halves: str) -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(8, 4, dtype=torch.bfloat16)])
    weight, x = module.blocks[0].weight.detach().clone(), torch.randn(5, 8, dtype=torch.bfloat16)
    quantize_(module, QuantConfig(weights=WeightConfig(rule=halves), activations=ActivationConfig(rule="halves/12")))
    layer = module.blocks[0]
    assert torch.equal(layer.weight_scale, weight.float().abs().amax(1) / 15 / 2)
    assert torch.equal(layer.quantize_input(x)[1], x.float().abs().amax(1) / 12 / 2)
    assert layer(x).isfinite().all()
    per_tensor = ActivationConfig("per_tensor", "halves/12")
    assert not parse(QuantConfig(activations=per_tensor)).independent
    # Outside of a block's own scales too.
    outside = parse(QuantConfig(format="nvfp4", weights=WeightConfig(rule="halves/2688")))
    assert torch.equal(outside.quantize_weight(torch.full((2, 16), 3.0))[1], torch.tensor(3.0) / 2688 / 2)


def test_a_plug_in_rule_trains_and_is_static(halves: str) -> None:
    scheme = parse(QuantConfig(activations=ActivationConfig("per_tensor", "halves/12", static=True)))
    trained = TrainableQuantLinear(nn.Linear(8, 4), scheme, 3.0, Training(scaling="delayed", window=1))
    assert trained.input_scale == torch.tensor(3.0) / 12 / 2
    trained(torch.full((2, 8), 6.0))
    trained.advance(trained.seen)
    assert trained.input_scale == torch.tensor(6.0) / 12 / 2


def test_names_of_plug_in_rules(halves: str) -> None:
    for taken in (halves, "amax", "direct", "mse", "p99.9"):
        with pytest.raises(ValueError, match="there is a scale rule"):
            register_scale_rule(taken, AmaxTo)
    with pytest.raises(ValueError, match="cannot be named 'a/b'"):
        register_scale_rule("a/b", AmaxTo)
    with pytest.raises(ValueError, match=r"did you mean halves\? .*ema\[/TARGET\], halves\[/TARGET\], mse, "):
        parse_rule("halve/3", HIF8)
