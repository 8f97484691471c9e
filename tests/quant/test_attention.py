"""Quantized attention against one written out by hand, and against Wan's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from tests.models import wan_inputs, wan_transformer
from wanquant.formats import hif8
from wanquant.quant import QuantConfig, QuantLinear, quantize_
from wanquant.quant.attention import QuantAttention
from wanquant.quant.scale import PowerOfTwo
from wanquant.quant.scheme import parse


class Nothing(QuantAttention):
    """The processor without its rounding: what is left has to be Wan's own attention."""

    def per_token(self, x: torch.Tensor) -> torch.Tensor:
        return x

    per_head = per_token


def run(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**wan_inputs()).sample


def test_without_rounding_it_is_wans_attention() -> None:
    model = wan_transformer(2)
    expected = run(model)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            attention.set_processor(Nothing(parse(QuantConfig(attention="qkv"))))
    assert torch.equal(run(model), expected)


def rounded_by(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    step = PowerOfTwo(15.0)(absmax)
    return hif8.round(x.float() / step) * step


def test_operands_are_hif8_times_powers_of_two() -> None:
    processor = QuantAttention(parse(QuantConfig(attention="qkv")))
    x = (torch.randn(2, 3, 7, 16) * torch.logspace(-3, 3, 7)[:, None]).to(torch.bfloat16)
    got = processor.per_token(x)
    assert torch.equal(got.float(), rounded_by(x, x.abs().amax(-1, keepdim=True).float()))
    got = processor.per_head(x)
    assert torch.equal(got.float(), rounded_by(x, x.abs().amax((-1, -2), keepdim=True).float()))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("product", ["fast", "exact"])
def test_rounded_probabilities(monkeypatch: pytest.MonkeyPatch, product: str, chunked: bool) -> None:
    """Against float64: of the logits nothing is rounded, of the exact product only the end."""
    if chunked:
        monkeypatch.setattr("wanquant.quant.attention.SCORES_AT_ONCE", 100)
    processor = QuantAttention(parse(QuantConfig(attention="qkvp", product=product)))
    query, key, value = (torch.randn(2, 3, n, 16).to(torch.bfloat16) for n in (7, 9, 9))
    got = processor.attend(query, key, value, None)
    scores = query.double() @ key.double().mT / math.sqrt(16)
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = hif8.round((numerators * 8).float()).double() / 8
    products, sums = rounded @ value.double(), numerators.sum(-1, keepdim=True)
    # Half a unit of BF16 for each of its roundings, and float32's of K terms.
    units = (2**-8 if product == "exact" else 2**-7) * (products / sums).abs()
    small = 2**-20 * (rounded @ value.double().abs()) / sums
    assert ((got.double() - products / sums).abs() <= units + small).all()
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value).double()
    assert 0 < (got - plain).norm() / plain.norm() < 0.05


def test_the_exact_product_is_nearer_to_float64() -> None:
    model = wan_transformer(1)
    attention, x = model.blocks[0].attn1, torch.randn(1, 24, 48).to(torch.bfloat16)
    outputs = {}
    for product in ("fast", "exact"):
        attention.set_processor(Nothing(parse(QuantConfig(attention="qkv", product=product))))
        outputs[product] = attention(x).double()
    attention.double()
    truth = attention(x.double())
    assert (outputs["exact"] - truth).norm() < (outputs["fast"] - truth).norm()


@pytest.fixture
def own_backend() -> Iterator[None]:
    """diffusers remembers the backend that any model was last told to use, for all models."""
    yield
    wan_transformer(1).set_attention_backend("native")


@pytest.mark.usefixtures("own_backend")
def test_what_it_does_not_do_is_refused() -> None:
    model = wan_transformer(1)
    quantize_(model, QuantConfig(attention="qkv"))
    model.set_attention_backend("native")
    run(model)
    model.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match="runs on torch's own"):
        run(model)
    model.set_attention_backend("native")
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="in parallel"):
        run(model)
    # Said before: the processor that was told so is about to be replaced.
    model = wan_transformer(1)
    model.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match="runs on torch's own"):
        quantize_(model, QuantConfig(attention="qkv"))
    assert not any(isinstance(child, QuantLinear) for child in model.modules())


@pytest.mark.parametrize("mode", ["qkv", "qkvp"])
def test_it_goes_where_the_projections_are_quantized(mode: str) -> None:
    model = wan_transformer(4)
    expected = run(model)
    report = quantize_(model, QuantConfig(attention=mode), (0,), ("attn2.to_k",))
    rows = {row.name: (row.status, row.reason) for row in report.attentions}
    assert rows == {
        **{f"blocks.0.{name}": ("protected", "block 0") for name in ("attn1", "attn2")},
        **{f"blocks.{i}.attn1": ("converted", f"block {i}") for i in (1, 2, 3)},
        **{f"blocks.{i}.attn2": ("protected", "module pattern") for i in (1, 2, 3)},
    }
    kinds = [[isinstance(a.processor, QuantAttention) for a in (b.attn1, b.attn2)] for b in model.blocks]
    assert kinds == [[False, False], [True, False], [True, False], [True, False]]
    error = (run(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_a_wrong_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"quant\.attention=all: choose off, qkv, qkvp"):
        parse(QuantConfig(attention="all"))
    with pytest.raises(ValueError, match="inputs in mxfp8 have no attention"):
        parse(QuantConfig(format="mxfp8", attention="qkv"))
    with pytest.raises(ValueError, match="no attention has its to_q"):
        quantize_(wan_transformer(2), QuantConfig(attention="qkv"), (), ("attn.*",))


def test_the_linears_are_quantized_besides() -> None:
    model = wan_transformer(2)
    quantize_(model, QuantConfig(attention="qkv"))
    assert isinstance(model.blocks[0].attn1.to_q, QuantLinear)
