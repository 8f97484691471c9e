"""What emulating four bits costs on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wanquant.formats.registry import FORMATS
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.scheme import parse
from wanquant.wan.products import quick_products

FOUR_BITS = [name for name, format_ in FORMATS.items() if format_.bits == 4]


def quickest(*calls: Callable[[], object]) -> list[float]:
    """Seconds of each, by turns, the best of several."""
    best = [float("inf")] * len(calls)
    for _ in range(8):
        for place, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - begun)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_BITS)
def test_a_linear_takes_at_most_1_6_of_one_in_bf16(name: str) -> None:
    """Rounding its input is the whole difference; tried three times, because others may use the processor too."""
    linear = nn.Linear(1536, 1536, dtype=torch.bfloat16).requires_grad_(False)
    layer = QuantLinear.from_linear(linear, parse(QuantConfig(format=name)))
    x, ratios = torch.randn(2048, 1536).to(torch.bfloat16), []
    with torch.no_grad(), quick_products(x.device):
        for _ in range(3):
            plain, quantized = quickest(lambda: linear(x), lambda: layer(x))
            ratios.append(quantized / plain)
            if ratios[-1] <= 1.6:
                return
    pytest.fail(f"{name} takes {min(ratios):.2f} times as long")
