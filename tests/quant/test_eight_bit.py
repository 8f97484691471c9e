"""Products of 8-bit codes: what they multiply, what is lost, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from tests.models import wan_inputs, wan_transformer
from wanquant import kernels
from wanquant.formats import hif8
from wanquant.formats.registry import get_format
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig, eight_bit, quantize_
from wanquant.quant.eight_bit import check_capability, encode_input, encode_weight, lost_in_weight
from wanquant.quant.last_input import LastInput
from wanquant.quant.scheme import parse

EVERY = torch.arange(256, dtype=torch.int32).to(torch.uint8)
FP8 = ("hif8", "e4m3", "e5m2")


def linear(columns: int = 48, rows: int = 33) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, dtype=torch.bfloat16)


def config(format_: str, product: str = "fp8", **more: object) -> QuantConfig:
    return replace(QuantConfig(format=format_, product=product), **more)  # type: ignore[arg-type]


def test_e4m3_carries_hif8_down_to_a_twelfth_binary_place() -> None:
    values = hif8.decode(EVERY)
    codes, lost = kernels.carry_e4m3(values, 16.0)
    carried, exact = codes.view(torch.float8_e4m3fn).float() / 16, values.float()
    within = (exact.abs() >= 2.0**-12) & (exact.abs() <= 28)
    assert within.sum() > 100
    assert torch.equal(carried[within], exact[within])
    assert carried[exact == 2.0**-13] == 2.0**-13
    assert carried[exact == -1.5 * 2.0**-13] == -(2.0**-12)  # between two of E4M3, to the even one
    assert (carried[exact.abs() < 2.0**-14] == 0).all()
    assert set(carried[exact.isfinite() & (exact.abs() > 28)].tolist()) == {-28.0, 28.0}
    assert carried[~exact.isfinite()].isnan().all()
    assert lost.tolist() == [int((carried != exact)[exact.isfinite()].sum()), 256]
    with pytest.raises(TypeError, match="bfloat16"):
        kernels.carry_e4m3(values.float(), 16.0)


@pytest.mark.parametrize("format_", [*FP8, "int8"])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_fast_product_where_nothing_is_lost(format_: str, packed: bool) -> None:
    """Bit for bit but for whole numbers, whose product is not rounded to BF16 before the scales."""
    product = "int8" if format_ == "int8" else "fp8"
    source, torch_x = linear(), torch.sign(torch.randn(2, 5, 48)) * (torch.rand(2, 5, 48) + 0.01)
    x = torch_x.to(torch.bfloat16)
    with torch.no_grad():
        source.weight.copy_(torch.sign(torch.randn(33, 48)) * (torch.rand(33, 48) + 0.01))
    ours = QuantLinear.from_linear(source, parse(config(format_, product, packed=packed)))
    fast = QuantLinear.from_linear(source, parse(config(format_, "fast")))
    assert ours.weight.dtype == torch.uint8
    assert torch.equal(ours.codes(), fast.codes())
    first, again, expected = ours(x), ours(x), fast(x)
    assert torch.equal(first, again)
    assert ours.lost.tolist() == [0, 2 * x.numel()]
    assert ours.lost_weights() == 0
    if format_ == "int8":
        exact = QuantLinear.from_linear(source, parse(config(format_, "exact")))
        assert torch.equal(first, exact(x))
    else:
        assert torch.equal(first, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("format_", FP8)
def test_what_is_lost_is_counted_and_small(format_: str, static: bool) -> None:
    act = ActivationConfig(granularity="per_tensor", static=True) if static else ActivationConfig()
    source, x = linear(256, 64), (torch.randn(40, 256) * torch.exp(2 * torch.randn(40, 256))).to(torch.bfloat16)
    largest = float(x.abs().max())
    scheme = parse(config(format_, activations=act))
    ours = QuantLinear.from_linear(source, scheme, largest)
    fast = QuantLinear.from_linear(source, parse(config(format_, "fast", activations=act)), largest)
    expected = fast(x).float()
    error = (ours(x).float() - expected).norm() / expected.norm()
    operand, _ = fast.quantize_input(x)
    codes = encode_input(scheme, x, ours.input_scale, None).values.view(torch.float8_e4m3fn)
    lost = int((codes.float() / scheme.lifts[1] != operand.float()).sum())
    assert ours.lost.tolist() == [lost, x.numel()]
    assert (lost == 0) == (format_ == "e4m3")
    assert error < 2e-3
    weights = encode_weight(scheme, ours.codes()).view(torch.float8_e4m3fn).float()
    held = weights / scheme.lifts[0] == scheme.format.decode(ours.codes(), torch.float32)
    assert ours.lost_weights() == lost_in_weight(scheme, ours.codes()) == int((~held).sum())


def test_what_is_not_finite_stays_visible() -> None:
    x = torch.ones(3, 48, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    for format_, product in (("hif8", "fp8"), ("e4m3", "fp8"), ("int8", "int8")):
        for act in (ActivationConfig(), ActivationConfig(granularity="per_tensor", static=True)):
            layer = QuantLinear.from_linear(linear(), parse(config(format_, product, activations=act)), 1.0)
            y = layer(x)
            assert y[1].isnan().all()
            assert y[[0, 2]].isfinite().all()


def test_what_makes_no_sense_is_refused() -> None:
    for format_, product, choose in (
        ("int8", "fp8", "fast or int8"),
        ("hif8", "int8", "fast or fp8"),
        ("bf16", "fp8", "fast"),
    ):
        with pytest.raises(ValueError, match=f"quant.product={product} is for .*: with {format_} choose {choose}$"):
            parse(config(format_, product))
    for side in ({"weights": WeightConfig(rule="mse")}, {"activations": ActivationConfig(rule="direct")}):
        with pytest.raises(
            ValueError, match=f"carries hif8 up to a target: choose quant.{next(iter(side))}.rule=amax/15"
        ):
            parse(config("hif8", **side))
    parse(config("e4m3", activations=ActivationConfig(rule="direct")))  # multiplies its own
    scheme, blocks = parse(config("hif8")), parse(config("mxfp8"))
    check_capability(scheme, (8, 9), "a card")
    with pytest.raises(ValueError, match=r"hif8 needs compute capability 8\.9, and a card has 8\.6: choose quant.prod"):
        check_capability(scheme, (8, 6), "a card")
    with pytest.raises(ValueError, match=r"mxfp8 needs compute capability 10\.0, and a card has 9\.0"):
        check_capability(blocks, (9, 0), "a card")


@pytest.mark.parametrize(("format_", "product"), [("hif8", "fp8"), ("e5m2", "fp8"), ("mxfp8", "fp8"), ("int8", "int8")])
def test_it_compiles_whole(format_: str, product: str) -> None:
    layer = QuantLinear.from_linear(linear(64, 32), parse(config(format_, product)))
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_transformer_of_it_is_the_fast_one_where_next_to_nothing_is_lost() -> None:
    outputs, inputs = {}, wan_inputs()
    for product in ("fast", "fp8"):
        torch.manual_seed(0)
        model = wan_transformer()
        quantize_(model, config("hif8", product))
        with torch.no_grad():
            outputs[product] = model(**inputs, return_dict=False)[0]
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    lost, coded = sum(layer.lost for layer in layers).tolist()
    assert lost < 1e-4 * coded
    assert (outputs["fp8"] - outputs["fast"]).float().norm() < 1e-4 * outputs["fast"].float().norm()


def test_an_input_is_rounded_once_for_all_that_get_it() -> None:
    last, made = LastInput(), []

    def make() -> int:
        made.append(1)
        return len(made)

    x = torch.ones(3)
    assert [last.rounded(x, make), last.rounded(x, make), last.rounded(x, make, of="other")] == [1, 1, 2]
    x += 1
    assert last.rounded(x, make, of="other") == 3
    assert last.rounded(x.clone(), make, of="other") == 4
    with torch.inference_mode():
        y = torch.ones(3)
        assert [last.rounded(y, make), last.rounded(y, make)] == [5, 6]
    z = torch.ones(3)
    last.rounded(z, make)
    assert last._last is not None
    del z
    assert last._last is None


def test_overflow_is_counted_for_each_layer_that_gets_the_input() -> None:
    scheme = parse(config("hif8", "fast", activations=ActivationConfig(rule="direct")))
    layers = [QuantLinear.from_linear(linear(), scheme) for _ in range(3)]
    x = torch.full((2, 48), 65536.0, dtype=torch.bfloat16)
    before = [int(layer.overflowed) for layer in layers]
    for layer in layers:
        layer(x)
    assert [int(layer.overflowed) - first for layer, first in zip(layers, before, strict=True)] == [96, 96, 96]


def test_what_e4m3_cuts_off_is_told_as_overflow() -> None:
    """A static scale for 1, and an input of 8: HiF8 holds 120, E4M3 no more than 28."""
    act = ActivationConfig(granularity="per_tensor", static=True)
    layer = QuantLinear.from_linear(linear(), parse(config("hif8", activations=act)), 1.0)
    x = torch.zeros(2, 48, dtype=torch.bfloat16)
    x[0, 3], x[1, 4] = 8.0, -1.5
    layer(x)
    assert (int(layer.overflowed), layer.lost.tolist()) == (1, [1, 96])


def test_lifts_leave_room_for_what_the_target_is_rounded_to() -> None:
    rules = {"amax/15": 16.0, "amax/16": 16.0, "amax/448": 0.5, "amax/8": 32.0}
    for rule, lift in rules.items():
        found = parse(config("hif8", activations=ActivationConfig(rule=rule))).lifts
        assert found == (16.0, lift)
    assert parse(config("e5m2")).lifts == (2.0**-7, 2.0**-7)
    assert parse(config("e4m3")).lifts == parse(config("mxfp8")).lifts == (1.0, 1.0)


def test_codes_are_made_anew_of_another_weight() -> None:
    first, second = linear(), nn.Linear(48, 33, dtype=torch.bfloat16)
    ours, other = (QuantLinear.from_linear(source, parse(config("hif8"))) for source in (first, second))
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    assert not torch.equal(ours(x), other(x))
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours(x), other(x))
    assert ours._coded is not None
    ours.to("meta")
    assert ours._coded is None


def test_nothing_of_a_trace_is_kept() -> None:
    scheme = parse(config("e5m2", weights=WeightConfig(rule="amax/1024")))
    layer = QuantLinear.from_linear(linear(), scheme)
    eight_bit._TABLES.clear()
    eight_bit._VALUES.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer._coded = None
        layer(torch.randn(2, 48, dtype=torch.bfloat16))
    assert not eight_bit._TABLES
    assert not eight_bit._VALUES
    assert not isinstance(layer(torch.randn(2, 48, dtype=torch.bfloat16)), FakeTensor)


def test_a_layer_that_runs_again_rounds_again() -> None:
    """The others that get the same input round it no more; each pass of one does, whatever was written behind torch's
    back."""
    scheme = parse(config("hif8"))
    layers = [QuantLinear.from_linear(linear(), scheme) for _ in range(2)]
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    first = layers[0](x)
    assert torch.equal(layers[1](x), first)
    x.data.mul_(-1)
    assert torch.equal(layers[0](x), layers[0](x.clone()))
    assert not torch.equal(layers[0](x), first)


def test_formats_agree_on_their_codes() -> None:
    """E4M3's codes are torch's, so that they are multiplied as they are."""
    assert torch.equal(
        get_format("e4m3").decode(EVERY).nan_to_num(7), EVERY.view(torch.float8_e4m3fn).bfloat16().nan_to_num(7)
    )
