"""BF16 linears on a CPU without BF16 products: the same product in float32, rounded once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from wanquant.kernels import products
from wanquant.wan.products import WideProducts, quick_products


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_exact_but_for_one_rounding(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts too, the last one shorter. Whole numbers: any order of summation gives the same."""
    monkeypatch.setattr(products, "WIDENED_AT_ONCE", 7 * 96)
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(torch.bfloat16).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randint(-9, 10, parameter.shape, generator=generator))
    x = torch.randint(-9, 10, (2, 13, 96), generator=generator).to(torch.bfloat16)
    with WideProducts():
        found = linear(x)
    exact = copy.deepcopy(linear).double()(x.double())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_what_is_not_bf16_is_left_alone() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(3, 8)
    expected = linear(x)
    with WideProducts():
        assert torch.equal(linear(x), expected)
    assert type(quick_products(torch.device("meta"))).__name__ == "nullcontext"
