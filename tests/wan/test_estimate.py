"""What a dry run prints, from shapes alone."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan_transformer
from wanquant.quant import QuantConfig, plan_conversion
from wanquant.wan.resources.printed import block_map


@pytest.mark.parametrize(
    ("config", "modules", "expected"),
    [
        (QuantConfig(), (), "PqqqqP"),
        (QuantConfig(), ("ffn.net.2",), "PmmmmP"),
        (QuantConfig(), (".*",), "P----P"),
        (QuantConfig(format="bf16"), (), "P----P"),
        (QuantConfig(format="bf16"), ("ffn.net.2",), "P----P"),
    ],
)
def test_the_map_shows_what_becomes_of_each_block(config: QuantConfig, modules: tuple[str, ...], expected: str) -> None:
    with torch.device("meta"):
        model = wan_transformer(6)
    assert block_map(plan_conversion(model, config, (0, -1), modules)) == expected
