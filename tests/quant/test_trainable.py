"""Forward is QuantLinear's to the bit; backward is that of the straight-through surrogate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig, Scheme, WeightConfig, parse
from wanquant.quant.linear import QuantLinear
from wanquant.quant.trainable import TrainableQuantLinear

CHOICES = {
    "default": QuantConfig(),
    "exact": QuantConfig(product="exact"),
    "per tensor": QuantConfig(weights=WeightConfig("per_tensor"), activations=ActivationConfig("per_tensor")),
    "direct": QuantConfig(
        weights=WeightConfig(rule="direct"), activations=ActivationConfig(rule="direct"), overflow="saturate"
    ),
    "static": QuantConfig(activations=ActivationConfig("per_tensor", static=True), overflow="saturate"),
    "int8": QuantConfig(format="int8"),
}


def layer(scheme: Scheme, bias: bool = True, clip_mask: bool = True) -> tuple[nn.Linear, TrainableQuantLinear]:
    linear = nn.Linear(24, 16, bias=bias)
    return linear, TrainableQuantLinear(linear, scheme, 2.0 if scheme.act_static else None, clip_mask)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_inference(name: str, dtype: torch.dtype) -> None:
    scheme = parse(CHOICES[name])
    linear, trained = layer(scheme)
    x = torch.randn(2, 5, 24).to(dtype)
    for bias in (True, False):
        linear, trained = layer(scheme, bias)
        expected = QuantLinear.from_linear(linear, scheme, 2.0 if scheme.act_static else None)(x)
        assert torch.equal(trained(x), expected)
        assert torch.equal(trained.frozen()(x), expected)
        assert trained(x).dtype == dtype
        assert (trained.bias is not None) is bias


def surrogate(trained: TrainableQuantLinear, x: torch.Tensor, masked: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """In float64 by autograd: rounding as an added constant, and nothing but a constant where a value is clipped."""
    inference = trained.frozen()
    operand, scale = inference.quantize_input(x)
    rounded_x = operand.double() * (scale[:, None] if scale.ndim else scale)
    w_scale = inference.weight_scale
    rounded_w = inference.weight.double() * (w_scale[:, None] if w_scale.ndim else w_scale)
    limit = trained.scheme.format.overflow
    leaves = [x.double().requires_grad_(), trained.weight.detach().double().requires_grad_()]
    parts = []
    for leaf, rounded, step in zip(leaves, (rounded_x, rounded_w), (scale, w_scale), strict=True):
        inside = (leaf.detach().bfloat16().double() if leaf is leaves[1] else leaf.detach()).abs() / (
            step[:, None] if step.ndim else step
        ) < limit
        parts.append(torch.where(inside, leaf + (rounded - leaf).detach(), rounded) if masked
                     else leaf + (rounded - leaf).detach())  # fmt: skip
    assert trained.bias is not None
    bias = trained.bias.detach().double().requires_grad_()
    return parts[0] @ parts[1].T + bias, [*leaves, bias]


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "default"])
@pytest.mark.parametrize("masked", [True, False])
def test_backward_is_that_of_the_surrogate(name: str, masked: bool) -> None:
    """Also where values are clipped: they lie far beyond the range of some."""
    scheme = parse(replace(CHOICES[name], product="exact"))
    _, trained = layer(scheme, clip_mask=masked)
    x = torch.randn(7, 24)
    if name in ("direct", "static"):
        x[0, :5] = torch.tensor([1e5, -1e5, 5e4, 3e4, 4e5])
    y, leaves = surrogate(trained, x, masked)
    upstream = torch.randn(7, 16)
    expected = torch.autograd.grad(y, leaves, upstream.double())
    x.requires_grad_()
    trained(x).backward(upstream)
    found = (x.grad, trained.weight.grad, trained.bias.grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))
    if name in ("direct", "static"):
        assert trained.clipped > 0
        assert x.grad is not None
        assert bool((x.grad[0, :3] == 0).all()) is masked


def test_finite_differences_of_the_surrogate() -> None:
    """The surrogate's own derivative, by moving single entries."""
    _, trained = layer(parse(QuantConfig(product="exact")))
    x, upstream = torch.randn(3, 24), torch.randn(3, 16).double()
    x.requires_grad_()
    trained(x).backward(upstream.float())
    _, (leaf_x, leaf_w, _) = surrogate(trained, x.detach(), masked=True)
    inference = trained.frozen()
    operand, scale = inference.quantize_input(x.detach())
    shift_x = operand.double() * scale[:, None] - leaf_x.detach()
    shift_w = inference.weight.double() * inference.weight_scale[:, None] - leaf_w.detach()

    def value(x_: torch.Tensor, w_: torch.Tensor) -> float:
        return float((((x_ + shift_x) @ (w_ + shift_w).T) * upstream).sum())

    step = 1e-3
    for which, grad in ((0, x.grad), (1, trained.weight.grad)):
        assert grad is not None
        for index in ((0, 3), (2, 23)):
            ends = []
            for sign in (1, -1):
                both = [leaf_x.detach().clone(), leaf_w.detach().clone()]
                both[which][index] += sign * step
                ends.append(value(both[0], both[1]))
            assert float(grad[index]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_fast_gradients_are_close_to_exact_ones() -> None:
    """BF16 products of the same operands."""
    grads = []
    linear, x, upstream = nn.Linear(64, 48), torch.randn(40, 64), torch.randn(40, 48)
    for product in ("exact", "fast"):
        trained = TrainableQuantLinear(linear, parse(QuantConfig(product=product)))
        leaf = x.clone().requires_grad_()
        trained(leaf).backward(upstream)
        grads.append((leaf.grad, trained.weight.grad))
    for exact, fast in zip(*grads, strict=True):
        assert exact is not None
        assert fast is not None
        assert 0 < float((exact - fast).norm() / exact.norm()) < 5e-3


def test_it_learns() -> None:
    """A linear map, through rounded operands, to about the error of rounding."""
    target, (_, trained) = torch.randn(16, 24), layer(parse(QuantConfig()))
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-2)
    for _ in range(300):
        x = torch.randn(64, 24)
        loss = (trained(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * target.square().sum(1).mean().item()


def test_what_cannot_be_trained_is_refused() -> None:
    linear = nn.Linear(32, 16)
    for config, words in (
        (QuantConfig(format="mxfp8"), "mxfp8 cannot be trained"),
        (QuantConfig(smoothing=0.5), "quant.smoothing cannot be trained"),
        (QuantConfig(weights=WeightConfig(rule="mse")), "quant.weights.rule=mse is searched for"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainableQuantLinear(linear, parse(config))
