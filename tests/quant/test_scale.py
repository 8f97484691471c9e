from __future__ import annotations

import math

import pytest
import torch

from wanquant.formats.registry import get_format
from wanquant.quant.scale import AmaxTo, Direct, PerRow, PerTensor, PowerOfTwo, parse_granularity, parse_rule

INF, NAN = float("inf"), float("nan")
HIF8 = get_format("hif8")


def test_rules_parse_to_their_classes() -> None:
    assert parse_rule("direct", HIF8) == Direct()
    assert parse_rule("amax", HIF8) == parse_rule("amax/15", HIF8) == AmaxTo(15.0)
    assert parse_rule("pow2", HIF8) == PowerOfTwo(15.0)
    assert parse_rule("pow2/16", HIF8) == PowerOfTwo(16.0)
    assert parse_granularity("per_channel", "per_channel", HIF8) == PerRow()
    assert parse_granularity("per_tensor", "per_token", HIF8) == PerTensor()


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
