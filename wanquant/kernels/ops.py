"""The operations as torch ops (``torch.ops.wanquant``), with an implementation per device.

torch's dispatcher chooses: the numba loops on the CPU, Triton on CUDA, the eager integer path on everything else,
shapes alone on ``meta`` and under ``torch.compile``. Nothing is differentiated: autograd falls through.

They are registered with ``Library.impl`` and not as ``torch.library.custom_op``, which costs three times the
dispatch, more than rounding the input of a small linear.
"""

from __future__ import annotations

from types import ModuleType

import torch

from wanquant.kernels import cpu, eager, shapes

#: Each device's module has a function of each name. ``saturate``: an overflow gives 32768 instead of infinity.
SCHEMAS = (
    "round_hif8(Tensor x, bool saturate) -> Tensor",
    "round_hif8_out(Tensor x, bool saturate, Tensor(a!) out) -> ()",
    "round_hif8_stochastic(Tensor x, Tensor noise, bool saturate) -> Tensor",
    "encode_hif8(Tensor x, bool saturate) -> Tensor",
    "decode_hif8(Tensor codes, ScalarType dtype) -> Tensor",
    "absmax_rows(Tensor x) -> Tensor",
    "scaled_round_hif8(Tensor x, Tensor scale, bool saturate) -> (Tensor, Tensor)",
    "quantize_rows_hif8(Tensor x, float goal, bool power_of_two, bool saturate) -> (Tensor, Tensor)",
    "descale(Tensor product, Tensor row_scale, Tensor column_scale, Tensor? bias, ScalarType dtype) -> Tensor",
)
_LIBRARY = torch.library.Library("wanquant", "DEF")


def _implement(key: str, device: ModuleType) -> None:
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if hasattr(device, name):
            _LIBRARY.impl(name, getattr(device, name), key)


for _schema in SCHEMAS:
    _LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(_schema.partition("(")[0], torch.library.fallthrough_kernel, "Autograd")
_implement("CompositeExplicitAutograd", eager)
_implement("CPU", cpu)
_implement("Meta", shapes)
