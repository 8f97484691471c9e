"""The W8A8 product at the shapes of Wan2.1-T2V-14B against the float64 product of the same codes and scales."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig
from wanquant.quant.scheme import parse

#: (in, out): attention projections, the two linears of the feed-forward part.
SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))
#: With all that is summed over, and some of the outputs: what each output is does not depend on the others.
NARROW = ((5120, 384), (13824, 384))
TOKENS = 24
GRANULARITIES = tuple(itertools.product(("per_channel", "per_tensor"), ("per_token", "per_tensor", "static")))
#: Root mean square error that may stand beside that of the roundings which have to be there.
SLACK = 1.05


def make(shape: tuple[int, int], weights: str, activations: str, product: str) -> QuantLinear:
    linear = nn.Linear(*shape, dtype=torch.bfloat16)
    linear.weight.data.mul_(torch.logspace(-1, 1, shape[1])[:, None])
    static = activations == "static"
    config = QuantConfig(
        weights=WeightConfig(weights),
        activations=ActivationConfig("per_tensor" if static else activations, static=static),
        product=product,
    )
    return QuantLinear.from_linear(linear, parse(config), seen=40.0 if static else None)


def inputs(columns: int) -> torch.Tensor:
    return (torch.randn(TOKENS, columns) * torch.logspace(-1, 1, TOKENS)[:, None]).to(torch.bfloat16)


class Reference:
    """The product of the codes in float64, and how far a float32 accumulation and BF16 roundings may be from it."""

    def __init__(self, layer: QuantLinear, x: torch.Tensor) -> None:
        operand, row_scale = layer.quantize_input(x)
        weight = layer.scheme.format.decode(layer.codes(), torch.float32).double()
        operand = operand.double()
        self.scale = row_scale.double().reshape(-1, 1) * layer.weight_scale.double()
        self.unscaled = operand @ weight.T
        self.y = self.unscaled * self.scale + layer.bias.double()
        self.accumulation = layer.in_features * 2.0**-24 * self.scale * (operand.abs() @ weight.abs().T)

    def tolerance(self, product: str) -> torch.Tensor:
        once_more = self.scale * unit(self.unscaled) if product == "fast" else 0.0
        return unit(self.y) + self.accumulation + once_more

    def expected_rms(self, product: str) -> float:
        """Of the roundings that have to be there: the output's, and with ``fast`` the unscaled product's."""
        y = self.y
        if product == "fast":
            y = y + (bf16(self.unscaled) - self.unscaled) * self.scale
        return rms((bf16(y) - self.y) / self.y.abs().mean(1, keepdim=True))

    def rms(self, y: torch.Tensor) -> float:
        return rms((y.double() - self.y) / self.y.abs().mean(1, keepdim=True))


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def unit(x: torch.Tensor) -> torch.Tensor:
    """One BF16 unit in the last place."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)


@pytest.mark.parametrize("product", ["exact", "fast"])
@pytest.mark.parametrize(("weights", "activations"), GRANULARITIES)
@pytest.mark.parametrize("shape", NARROW)
def test_within_the_roundings_that_have_to_be(
    shape: tuple[int, int], weights: str, activations: str, product: str
) -> None:
    check(shape, weights, activations, product)


@pytest.mark.parametrize("product", ["exact", "fast"])
@pytest.mark.parametrize("shape", [*(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:]), SHAPES[0]])
def test_whole_linears_too(shape: tuple[int, int], product: str) -> None:
    check(shape, "per_channel", "per_token", product)


def check(shape: tuple[int, int], weights: str, activations: str, product: str) -> None:
    layer, x = make(shape, weights, activations, product), inputs(shape[0])
    reference, y = Reference(layer, x), layer(x)
    assert ((y.double() - reference.y).abs() <= reference.tolerance(product)).all()
    assert reference.rms(y) <= SLACK * reference.expected_rms(product)


def scales_in_bf16(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    operand, scale = layer.quantize_input(x)
    product = operand.float() @ layer.weight.float().T
    return (product * bf16(scale).float()[:, None] * bf16(layer.weight_scale).float() + layer.bias).to(torch.bfloat16)


def scales_in_the_operands(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    operand, scale = layer.quantize_input(x)
    weight = (layer.weight * layer.weight_scale[:, None]).to(torch.bfloat16)
    return ((operand * scale[:, None]).to(torch.bfloat16).float() @ weight.float().T + layer.bias).to(torch.bfloat16)


def bias_after_rounding(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    operand, scale = layer.quantize_input(x)
    product = operand.float() @ layer.weight.float().T
    return (product * scale[:, None] * layer.weight_scale).to(torch.bfloat16) + layer.bias


def divided_in_bf16(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    _, scale = layer.quantize_input(x)
    operand, _ = layer.scheme.format.scaled_round((x / scale[:, None]).to(torch.bfloat16), torch.ones(()), "inf")
    product = operand.float() @ layer.weight.float().T
    return (product * scale[:, None] * layer.weight_scale + layer.bias).to(torch.bfloat16)


@pytest.mark.parametrize("wrong", [scales_in_bf16, scales_in_the_operands, bias_after_rounding, divided_in_bf16])
def test_it_would_catch_another_rounding(wrong: Callable[[QuantLinear, torch.Tensor], torch.Tensor]) -> None:
    layer, x = make(NARROW[0], "per_channel", "per_token", "exact"), inputs(NARROW[0][0])
    layer.bias.data.mul_(100)
    reference = Reference(layer, x)
    assert reference.rms(layer(x)) <= SLACK * reference.expected_rms("exact")
    assert reference.rms(wrong(layer, x)) > SLACK * reference.expected_rms("exact")
