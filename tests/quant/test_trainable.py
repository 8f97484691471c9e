"""Forward is QuantLinear's to the bit; backward is that of the straight-through surrogate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wanquant.kernels import products
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig, WeightConfig
from wanquant.quant.linear import QuantLinear
from wanquant.quant.scheme import Scheme, parse
from wanquant.quant.trainable import LastInput, TrainableQuantLinear, Training

CHOICES = {
    "default": QuantConfig(),
    "exact": QuantConfig(product="exact"),
    "per tensor": QuantConfig(weights=WeightConfig("per_tensor"), activations=ActivationConfig("per_tensor")),
    "direct": QuantConfig(
        weights=WeightConfig(rule="direct"), activations=ActivationConfig(rule="direct"), overflow="saturate"
    ),
    "static": QuantConfig(activations=ActivationConfig("per_tensor", static=True), overflow="saturate"),
    "int8": QuantConfig(format="int8"),
    "mxfp8": QuantConfig(format="mxfp8"),
    "nvfp4 static": QuantConfig(format="nvfp4", activations=ActivationConfig(static=True)),
    "hif4 beside hif8": QuantConfig(format="hif4", activations=ActivationConfig(format="hif8")),
}
#: In which an input can be beyond the range.
CLIPPED = ("direct", "static", "nvfp4 static")
#: Features in: whole blocks of each format.
IN = 64


def layer(
    scheme: Scheme, bias: bool = True, clip_mask: bool = True, columns: int = 24
) -> tuple[nn.Linear, TrainableQuantLinear]:
    linear = nn.Linear(columns, 16, bias=bias)
    return linear, TrainableQuantLinear(
        linear, scheme, 2.0 if scheme.act_static else None, Training(clip_mask=clip_mask)
    )


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_inference(name: str, dtype: torch.dtype) -> None:
    scheme = parse(CHOICES[name])
    x = torch.randn(2, 5, IN).to(dtype)
    for bias in (True, False):
        linear, trained = layer(scheme, bias, columns=IN)
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
    limits = trained.scheme.act_format.overflow, trained.scheme.format.overflow
    leaves = [x.double().requires_grad_(), trained.weight.detach().double().requires_grad_()]
    parts = []
    for leaf, rounded, own, limit in zip(leaves, (rounded_x, rounded_w), (scale, w_scale), limits, strict=True):
        inside = (leaf.detach().bfloat16().double() if leaf is leaves[1] else leaf.detach()).abs() / (
            own[:, None] if own.ndim else own
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
    _, trained = layer(scheme, clip_mask=masked, columns=IN)
    x = torch.randn(7, IN)
    if name in CLIPPED:
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
    if name in CLIPPED:
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


class _Products(TorchDispatchMode):
    """Which types are multiplied by which."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", ["none", "hif8"])
def test_a_cpu_without_bf16_products_takes_none_in_backward(gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There they take eight times as long, and torch takes backward outside of the modes that replace them."""
    trained = TrainableQuantLinear(nn.Linear(64, 48), parse(QuantConfig()), how=Training(gradients=gradients))
    x, upstream, found = torch.randn(40, 64), torch.randn(40, 48), []
    for multiplies in (torch.backends.mkldnn.is_available(), False):
        monkeypatch.setattr(products, "multiplies_bf16", lambda device, answer=multiplies: answer)
        leaf = x.clone().requires_grad_()
        trained.weight.grad = None
        output = trained(leaf)
        with _Products() as taken:
            output.backward(upstream)
        assert taken.seen == [torch.bfloat16 if multiplies else torch.float32] * 2
        found.append((leaf.grad, trained.weight.grad))
    for native, wide in zip(*found, strict=True):
        assert native is not None
        assert wide is not None
        assert torch.allclose(native, wide, rtol=2**-7, atol=2**-7 * float(native.abs().max()))


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


@pytest.mark.parametrize("per", ["per_channel", "per_tensor"])
def test_learned_scales_have_the_gradient_of_the_surrogate(per: str) -> None:
    """s exp(g) Q(v), with Q(v) - v constant where it is rounded: by autograd in float64, at g = 0 and elsewhere."""
    quant = QuantConfig(
        product="exact",
        weights=WeightConfig(per),
        activations=ActivationConfig("per_tensor", static=True),
        overflow="saturate",
    )
    how = Training(weights=False, learn_scales=True)
    trained = TrainableQuantLinear(nn.Linear(24, 16), parse(quant), 2.0, how)
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == {"weight_gain", "input_gain"}
    assert trained.weight.dtype == torch.bfloat16
    x, upstream = torch.randn(7, 24), torch.randn(7, 16)
    for _ in range(2):
        trained.zero_grad()
        trained(x).backward(upstream)
        assert trained.initial_scale is not None
        assert trained.input_scale is not None
        gains = [trained.weight_gain.detach().double(), trained.input_gain.detach().double()]
        leaves = [gain.requires_grad_() for gain in gains]
        parts = []
        for values, base, gain in (
            (trained.weight.double(), trained.initial_scale, leaves[0]),
            (x.double(), trained.input_scale, leaves[1]),
        ):
            scale = base.double() * gain.exp()
            scale = scale[:, None] if scale.ndim else scale
            v = values / scale.detach()
            rounded = trained.scheme.format.round(v.float(), "saturate").double()
            parts.append(scale * (values / scale + (rounded - v)))  # straight through: the derivative of Q is 1
        assert trained.bias is not None
        ((parts[1] @ parts[0].T) * upstream.double()).sum().backward()
        for ours, theirs in zip((trained.weight_gain, trained.input_gain), leaves, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
        assert torch.equal(trained.frozen()(x), trained(x))
        with torch.no_grad():
            trained.weight_gain += 0.2
            trained.input_gain -= 0.1


def test_searched_scales_stay_as_found() -> None:
    trained = TrainableQuantLinear(nn.Linear(24, 16), parse(QuantConfig(weights=WeightConfig(rule="mse"))))
    before = trained.frozen().weight_scale
    with torch.no_grad():
        trained.weight.mul_(1.5)
    assert torch.equal(trained.frozen().weight_scale, before)


@pytest.mark.parametrize("gradients", ["hif8", "stochastic"])
def test_quantized_gradients(gradients: str) -> None:
    """Each operand on the grid by one step; the stochastic one is right on average, the nearest one is close."""
    torch.manual_seed(0)
    linear, x, upstream = nn.Linear(24, 16), torch.randn(30, 24), torch.randn(30, 16)
    scheme = parse(QuantConfig(product="exact"))

    def grads(how: str) -> list[torch.Tensor]:
        trained = TrainableQuantLinear(linear, scheme, how=Training(gradients=how))
        leaf = x.clone().requires_grad_()
        trained(leaf).backward(upstream)
        assert leaf.grad is not None
        assert trained.weight.grad is not None
        return [leaf.grad, trained.weight.grad]

    plain, once = grads("none"), grads(gradients)
    many = [torch.stack(all_).mean(0) for all_ in zip(*(grads(gradients) for _ in range(400)), strict=True)]
    for exact, one, mean in zip(plain, once, many, strict=True):
        off = [float((found - exact).norm() / exact.norm()) for found in (one, mean)]
        assert 0.005 < off[0] < 0.2
        assert off[1] < off[0] / 8 if gradients == "stochastic" else off[1] == pytest.approx(off[0])
    # By hand: dx, of gradients already times the weight's scales.
    if gradients == "hif8":
        frozen = TrainableQuantLinear(linear, scheme).frozen()
        scaled = upstream * frozen.weight_scale
        step = scaled.abs().amax() / 224
        expected = (scheme.format.round(scaled / step, "inf") @ frozen.weight.float()) * step
        torch.testing.assert_close(once[0], expected, rtol=1e-5, atol=1e-6)


def test_delayed_scales_follow_the_history() -> None:
    quant = QuantConfig(activations=ActivationConfig("per_tensor", "amax/15", static=True))
    trained = TrainableQuantLinear(nn.Linear(4, 4), parse(quant), 3.0, Training(scaling="delayed", window=3))
    scales = [float(trained.input_scale)]  # type: ignore[arg-type]
    for largest in (6.0, 2.0, 1.0, 0.5, 9.0):
        for magnitude in (largest / 2, largest, largest / 4):  # several forward passes make one step
            trained(torch.full((2, 4), -magnitude))
        trained.advance(trained.seen)
        scales.append(float(trained.input_scale))  # type: ignore[arg-type]
    # The calibrated 3 counts as the step before the first; then maxima of three: 3 6 | 3 6 2 | 6 2 1 | 2 1 .5 | 1 .5 9
    assert [round(15 * scale, 5) for scale in scales] == [3, 6, 6, 6, 2, 9]
    assert trained.history.tolist() == [1.0, 0.5, 9.0]
    assert float(trained.frozen().input_scale) == scales[-1]  # type: ignore[arg-type]
    last = TrainableQuantLinear(nn.Linear(4, 4), parse(quant), 3.0, Training(scaling="delayed", window=1))
    last(torch.ones(2, 4))
    last.advance(last.seen)
    assert 15 * float(last.input_scale) == pytest.approx(1.0)  # type: ignore[arg-type]
    last(torch.full((2, 4), torch.nan))
    last.advance(last.seen)
    assert last(torch.ones(2, 4)).isnan().all()


def test_a_warm_up_is_plain_bf16() -> None:
    linear, trained = layer(parse(QuantConfig()))
    trained.quantizing = False
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(trained(x), linear.to(torch.bfloat16)(x))


def test_layers_that_share_an_input_round_it_once() -> None:
    last, scheme, x = LastInput(), parse(QuantConfig()), torch.randn(5, 24)
    layers = [TrainableQuantLinear(nn.Linear(24, 8), scheme, last=last) for _ in range(2)]
    rounded = []
    for each in layers:
        each(x)
        assert last._last is not None
        rounded.append(last._last[2][0])
    assert rounded[0] is rounded[1]
    first = layers[0](x)
    x.mul_(2)
    layers[1](x)
    assert last._last is not None
    assert last._last[2][0] is not rounded[0]
    assert not torch.equal(layers[0](x), first)
    layers[0](x.clone())
    assert last._last is None  # the clone is gone, and is not mistaken for another


def test_what_cannot_be_trained_is_refused() -> None:
    linear, delayed = nn.Linear(32, 8), Training(scaling="delayed")
    static = ActivationConfig("per_tensor", "p99.9/15", static=True)
    for quant, how, word in (
        (QuantConfig(smoothing=0.5), Training(), "smoothing"),
        (QuantConfig(product="native"), Training(), "native"),
        (QuantConfig(format="int8"), Training(gradients="hif8"), "int8"),
        (QuantConfig(), delayed, "static=true"),
        (QuantConfig(activations=static), delayed, "p99.9/15"),
        (QuantConfig(activations=ActivationConfig("per_tensor", "direct", static=True)), delayed, "not direct"),
    ):
        with pytest.raises(ValueError, match=word):
            TrainableQuantLinear(linear, parse(quant), 1.0, how)
    for wrong in ({"gradients": "int4"}, {"scaling": "late"}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Training(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learned"):
        Training(learn_scales=True, scaling="delayed")


@pytest.mark.parametrize("format_", ["int8", "e4m3"])
def test_learned_scales_where_values_are_clipped(format_: str) -> None:
    """By finite differences of the surrogate: Q is constant there, and its value moves with the scale alone."""
    quant = QuantConfig(
        format=format_, product="exact", activations=ActivationConfig("per_tensor", static=True), overflow="saturate"
    )
    trained = TrainableQuantLinear(nn.Linear(24, 16), parse(quant), 2.0, Training(weights=False, learn_scales=True))
    assert trained.weight_gain is not None
    assert trained.input_gain is not None
    with torch.no_grad():
        trained.weight_gain -= 0.7
        trained.input_gain -= 0.7
    x, upstream = 2 * torch.randn(7, 24), torch.randn(7, 16)
    trained(x).backward(upstream)
    assert trained.clipped > 0
    assert trained.clipped_weights > 0
    assert trained.initial_scale is not None
    assert trained.input_scale is not None
    steps = [trained.initial_scale.double() * math.e**-0.7, trained.input_scale.double() * math.e**-0.7]
    values, parts = [trained.weight.double(), x.double()], []
    for value, step in zip(values, steps, strict=True):
        v = value / (step[:, None] if step.ndim else step)
        q = trained.scheme.format.round(v.float(), "saturate").double()
        inside = v.abs() < trained.scheme.format.overflow
        parts.append((value, step, q - v, q, inside))

    def output(gains: tuple[float, float]) -> torch.Tensor:
        """The surrogate at scales moved by these: v moves with them and the rounding stays, or the bound does."""
        operands = []
        for (value, step, missed, q, inside), gain in zip(parts, gains, strict=True):
            moved = (step * math.e**gain)[..., None] if step.ndim else step * math.e**gain
            operands.append(torch.where(inside, value + moved * missed, moved * q))
        return (operands[1] @ operands[0].T * upstream.double()).sum()

    eps = 1e-4
    by_weight = (output((eps, 0)) - output((-eps, 0))) / (2 * eps)
    by_input = (output((0, eps)) - output((0, -eps))) / (2 * eps)
    assert float(trained.weight_gain.grad.sum()) == pytest.approx(float(by_weight), rel=1e-2, abs=1e-2)  # type: ignore[union-attr]
    assert float(trained.input_gain.grad) == pytest.approx(float(by_input), rel=1e-2, abs=1e-2)  # type: ignore[arg-type]
