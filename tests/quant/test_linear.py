from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from wanquant.formats import hif8, reference
from wanquant.kernels import absmax_rows, eager, scaled_round_hif8
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig
from wanquant.quant.scheme import parse


def make(
    weight_rows: str = "per_channel",
    act_rows: str = "per_token",
    rule: str = "amax/15",
    static: bool = False,
    **rest: object,
) -> QuantConfig:
    return QuantConfig(
        weights=WeightConfig(weight_rows, rule),
        activations=ActivationConfig(act_rows, rule, static),
        **rest,  # type: ignore[arg-type]
    )


def by_hand(linear: nn.Linear, x: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """y = s_x s_w (Q(x / s_x) Q(w / s_w)ᵀ) + b in float64, rounded by the scalar reference, with the scheme's steps."""
    scheme = parse(config)
    weight = linear.weight.detach().to(torch.bfloat16)
    s_w = scheme.weight_rule(scheme.weight_granularity.reduce(weight.float().abs().amax(1)))
    s_x = scheme.act_rule(scheme.act_granularity.reduce(x.float().abs().amax(1)))
    s_w, s_x = s_w.expand(len(weight)), s_x.expand(len(x))
    q_w, q_x = (
        torch.tensor([[reference.round(value) for value in row] for row in (m.float() / s[:, None]).tolist()]).double()
        for m, s in ((weight, s_w), (x, s_x))
    )
    y = (q_x @ q_w.T) * s_x.double()[:, None] * s_w.double()
    return y if linear.bias is None else y + linear.bias.double()


GRID = list(
    itertools.product(
        ["per_channel", "per_tensor"], ["per_token", "per_tensor"], ["amax/15", "amax/16", "pow2/15", "direct"]
    )
)


@pytest.mark.parametrize(("weight_rows", "act_rows", "rule"), GRID)
def test_exact_product_is_the_formula(weight_rows: str, act_rows: str, rule: str) -> None:
    linear = nn.Linear(96, 64, dtype=torch.bfloat16)
    x = torch.randn(33, 96).to(torch.bfloat16) * torch.logspace(-2, 1, 33)[:, None].to(torch.bfloat16)
    config = make(weight_rows, act_rows, rule, product="exact")
    expected = by_hand(linear, x, config)
    layer = QuantLinear.from_linear(linear, parse(config))
    got = layer(x)
    assert got.dtype == torch.bfloat16
    # One BF16 rounding of the output, and float32 accumulation.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)


def test_fast_product_rounds_once_more_and_pow2_does_not_mind() -> None:
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    x = torch.randn(50, 256).to(torch.bfloat16)
    exact, fast = (QuantLinear.from_linear(linear, parse(make(product=p)))(x).double() for p in ("exact", "fast"))
    error = (exact - fast).norm() / exact.norm()
    assert 0 < error < 4e-3
    linear.bias = None
    exact, fast = (QuantLinear.from_linear(linear, parse(make(rule="pow2", product=p)))(x) for p in ("exact", "fast"))
    # The same bits but for a few sums, which the two products accumulate in another order.
    assert (exact == fast).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_product(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_linear(nn.Linear(256, 48, dtype=torch.bfloat16), parse(QuantConfig(product="exact")))
    x = torch.randn(9, 256)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        got = layer(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format_", ["hif8", "int8"])
def test_an_exact_product_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, format_: str) -> None:
    """Also compiled, on meta, and for an input that wants a gradient, which it does not get."""
    config = QuantConfig(format=format_, product="exact")
    layer = QuantLinear.from_linear(nn.Linear(64, 50, dtype=torch.bfloat16), parse(config))
    x = torch.randn(3, 7, 64)
    expected = layer(x)
    monkeypatch.setattr("wanquant.quant.product.WIDENED_AT_ONCE", 64 * 16)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert not layer(x.clone().requires_grad_()).requires_grad
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
    assert layer.to("meta")(x.to("meta")).shape == (3, 7, 50)


def test_weights_are_on_the_grid_and_packing_loses_nothing() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    plain = QuantLinear.from_linear(linear, parse(make()))
    packed = QuantLinear.from_linear(linear, parse(make(packed=True)))
    assert torch.equal(hif8.round(plain.weight), plain.weight)
    assert packed.weight.dtype == torch.uint8
    assert torch.equal(hif8.decode(packed.weight), plain.weight)
    assert torch.equal(packed.codes(), plain.codes())
    assert torch.equal(plain(x), packed(x))
    assert plain(x).shape == (2, 5, 32)
    assert isinstance(plain, nn.Linear)


def test_float32_source_equals_bfloat16_source() -> None:
    linear = nn.Linear(64, 32)
    other = nn.Linear(64, 32, dtype=torch.bfloat16)
    other.load_state_dict(linear.state_dict())
    a, b = (QuantLinear.from_linear(source, parse(make())) for source in (linear, other))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    x = torch.randn(5, 64).to(torch.bfloat16)
    assert torch.equal(a(x), b(x))


def test_scales_stay_float32_when_the_model_is_cast() -> None:
    layer = QuantLinear.from_linear(
        nn.Linear(16, 8, dtype=torch.bfloat16), parse(make(act_rows="per_tensor", static=True)), seen=3.1
    )
    scales = layer.weight_scale.clone(), layer.input_scale.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight_scale, scales[0])
    assert torch.equal(layer.input_scale, scales[1])
    x = torch.randn(2, 16).to(torch.bfloat16)
    before = layer(x)
    assert before.isfinite().all()
    layer.float()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer(x.float()).to(torch.bfloat16), before)


def test_overflow_is_counted() -> None:
    layer = QuantLinear.from_linear(nn.Linear(16, 8, dtype=torch.bfloat16), parse(make(rule="direct")))
    x = torch.ones(4, 16, dtype=torch.bfloat16)
    layer(x)
    assert layer.overflowed == 0
    x[1, :3] = 50_000.0
    assert not layer(x)[1].isfinite().any()
    assert layer.overflowed == 3
    assert layer.overflowed_weight == 0
    large = nn.Linear(16, 8, dtype=torch.bfloat16)
    large.weight.data[2, :5] = 50_000.0
    assert QuantLinear.from_linear(large, parse(make())).overflowed_weight == 0
    assert QuantLinear.from_linear(large, parse(make(rule="direct"))).overflowed_weight == 5


def test_static_scale_is_used_for_every_token() -> None:
    linear = nn.Linear(16, 8, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(linear, parse(make(act_rows="per_tensor", static=True)), seen=30.0)
    assert layer.input_scale is not None
    assert layer.input_scale.item() == 2.0
    operand, scale = layer.quantize_input(torch.full((3, 16), 4.0))
    assert scale.item() == 2.0
    assert (operand == 2.0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_broken_token_turns_nan_and_leaves_the_others(bad: float) -> None:
    layer = QuantLinear.from_linear(nn.Linear(16, 8, dtype=torch.bfloat16), parse(make()))
    x = torch.randn(4, 16).to(torch.bfloat16)
    x[2, 3] = bad
    y = layer(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_compiled_scaled_rounding_equals_eager(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 257) * torch.logspace(-6, 3, 257)).to(dtype)
    x[5, 7], x[6, 0] = float("nan"), float("inf")
    assert torch.equal(absmax_rows(x).nan_to_num(-1), eager.absmax_rows(x).nan_to_num(-1))
    for scale in (torch.rand(300) + 0.01, torch.tensor(0.37)):
        got, expected = scaled_round_hif8(x, scale), eager.scaled_round_hif8(x, scale, saturate=False)
        assert torch.equal(got[0].view(torch.int16), expected[0].view(torch.int16))
        assert got[1] == expected[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(format="fp4"), r"quant.format=fp4: did you mean nvfp4\? choose hif8"),
        (QuantConfig(format="posit"), "quant.format=posit: choose hif8"),
        (QuantConfig(overflow="wrap"), "quant.overflow=wrap"),
        (QuantConfig(product="quick"), "quant.product=quick"),
        (make(weight_rows="per_token"), "per_tensor or per_channel"),
        (make(static=True), "needs quant.activations.granularity=per_tensor"),
    ],
)
def test_a_wrong_config_is_named(config: QuantConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(config)
