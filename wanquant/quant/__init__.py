"""Where rounding happens in any ``nn.Module``. Knows nothing of diffusers: it is given modules and names.

Names are imported on first use, so that a config can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanquant.lazy import from_modules
from wanquant.quant.config import ActivationConfig, QuantConfig, WeightConfig

if TYPE_CHECKING:
    from wanquant.quant.conversion import ConversionReport, ModuleReport, plan_conversion
    from wanquant.quant.convert import make_trainable_, quantize_
    from wanquant.quant.linear import QuantLinear

__all__ = [
    "ActivationConfig",
    "ConversionReport",
    "ModuleReport",
    "QuantConfig",
    "QuantLinear",
    "WeightConfig",
    "make_trainable_",
    "plan_conversion",
    "quantize_",
]

_CONVERT = ("ConversionReport", "ModuleReport", "make_trainable_", "plan_conversion", "quantize_")
__getattr__ = from_modules(
    __name__, {"QuantLinear": "wanquant.quant.linear", **dict.fromkeys(_CONVERT, "wanquant.quant.convert")}
)
