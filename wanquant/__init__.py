"""wanquant: quantization of text-to-video diffusion transformers, first of all HiFloat8 on Wan.

    from wanquant import load_pipeline, quantize_, save_quantized

The pipeline functions are imported on first use, so that ``wanquant.formats`` and ``wanquant.quant``
stay light and need no diffusers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wanquant.lazy import from_modules
from wanquant.registered import register

# Where torch_npu is installed without CANN, torch's backend autoload makes `import torch` fail.
# Whoever wants an NPU gets torch_npu imported by wanquant.wan.device.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
register()

__version__ = "0.1.0"
__all__ = ["load_pipeline", "quantize_", "save_quantized"]

if TYPE_CHECKING:
    from wanquant.quant.convert import quantize_
    from wanquant.wan.checkpoints.checkpoint import save_quantized
    from wanquant.wan.load import load_pipeline

__getattr__ = from_modules(
    __name__,
    {
        "load_pipeline": "wanquant.wan.load",
        "quantize_": "wanquant.quant.convert",
        "save_quantized": "wanquant.wan.checkpoints.checkpoint",
    },
)
