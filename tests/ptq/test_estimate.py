"""What a plan times of its own: every preset can be planned."""

from __future__ import annotations

import pytest
import torch

from tests.models import wan_transformer
from tests.test_config import CHOICES, composed
from wanquant.ptq.estimate import _quantizing, count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.quant.statistics import Layout
from wanquant.wan.config import GenerationConfig
from wanquant.wan.resources.empty import Quantized
from wanquant.wan.resources.probe import small_pass

CPU = torch.device("cpu")
WIDTHS = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 128}
LINEARS = [name for name, child in wan_transformer(1).blocks[0].named_modules() if isinstance(child, torch.nn.Linear)]


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "quant"])
def test_every_preset_is_timed(name: str) -> None:
    """Also what needs statistics of the inputs, and attention in 8 bits."""
    plan = resolve(composed(f"quant={name}"))
    assert (_quantizing(estimate_resources(plan, count_videos(plan))) > 0) == (name != "bf16")
    small, settings = {**wan_transformer(1).config, **WIDTHS}, GenerationConfig(64, 64, 5, 1, 2.0, 3.0, 32)
    scheme = plan.scheme
    how = Quantized(LINEARS, scheme) if name != "bf16" else None
    observed = Layout(("",), 1, 4, 1, scheme.needs_statistics)
    assert small_pass(small, how, settings, 1, CPU) > 0
    assert small_pass(small, None, settings, 1, CPU, observed) > 0
