"""Linears of a whole model quick on CPUs without BF16 products, while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from wanquant.kernels.products import multiplies_bf16, wide_linear


def quick_products(device: torch.device) -> AbstractContextManager[Any]:
    """While entered, linears on a CPU without BF16 products are quick; elsewhere nothing changes. Not those inside
    ``backward``, which torch takes outside of its modes."""
    return nullcontext() if multiplies_bf16(device) else WideProducts()


class WideProducts(TorchFunctionMode):
    """Takes every BF16 ``F.linear`` on the CPU in float32 and rounds its result to BF16 once."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and args[0].dtype == torch.bfloat16 and args[0].device.type == "cpu":
            return wide_linear(*args, **kwargs)
        return function(*args, **kwargs)
