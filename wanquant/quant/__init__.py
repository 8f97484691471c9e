"""Where rounding happens in any ``nn.Module``. Knows nothing of diffusers: it is given modules and names."""

from wanquant.quant.config import ActivationConfig, QuantConfig, WeightConfig
from wanquant.quant.convert import ConversionReport, ModuleReport, make_trainable_, plan_conversion, quantize_
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
