"""The operations as torch ops (``torch.ops.wanquant``), with an implementation per device.

torch's dispatcher chooses: the numba loops on the CPU, Triton on CUDA, the eager integer path on everything else and on
``meta``, which tells ``torch.compile`` and fake tensors the shapes. Nothing is differentiated: autograd falls through.

They are registered with ``Library.impl`` and not as ``torch.library.custom_op``, which costs three times the
dispatch, more than rounding the input of a small linear.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from wanquant.kernels import blocks, cpu, eager, npu

#: Each device's module has a function of each name. ``saturate``: an overflow gives 32768 instead of infinity.
SCHEMAS = (
    "round_hif8(Tensor x, bool saturate) -> Tensor",
    "round_hif8_out(Tensor x, bool saturate, Tensor(a!) out) -> ()",
    "round_hif8_stochastic(Tensor x, Tensor noise, bool saturate) -> Tensor",
    "encode_hif8(Tensor x, bool saturate) -> Tensor",
    "decode_hif8(Tensor codes, ScalarType dtype) -> Tensor",
    "absmax_rows(Tensor x) -> Tensor",
    "scaled_round_hif8(Tensor x, Tensor scale, bool saturate, Tensor? factors=None) -> (Tensor, Tensor)",
    "quantize_rows_hif8(Tensor x, float goal, bool power_of_two, bool saturate, Tensor? factors=None)"
    " -> (Tensor, Tensor)",
    "descale(Tensor product, Tensor row_scale, Tensor column_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    "look_up(Tensor codes, Tensor table) -> Tensor",
    "carry_e4m3(Tensor values, float lift) -> (Tensor, Tensor)",
    "quantize_rows_coded(Tensor x, int kind, float goal, bool power_of_two, float lift, float divisor,"
    " Tensor? factors=None) -> (Tensor, Tensor, Tensor)",
    "round_blocks(Tensor x, Tensor scale, int block, int kind, int mantissa, int exponent, float largest, float limit,"
    " Tensor? factors=None) -> (Tensor, Tensor)",
    "split_blocks(Tensor values, int block, int kind, int mantissa, int exponent, float largest, int bits)"
    " -> (Tensor, Tensor, Tensor)",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
#: Those with a Triton kernel; the others are few elements, or plain torch does them well.
ON_CUDA = (
    *("round_hif8", "round_hif8_out", "encode_hif8", "decode_hif8", "look_up"),
    *("scaled_round_hif8", "quantize_rows_hif8", "quantize_rows_coded", "carry_e4m3", "descale", "round_blocks"),
)
#: Those for which the chip may have a cast of its own.
ON_NPU = ("round_hif8", "round_hif8_out", "encode_hif8", "scaled_round_hif8", "quantize_rows_hif8")
#: In plain torch, for every other device.
EAGER = (eager, blocks)
_LIBRARY = torch.library.Library("wanquant", "DEF")


def find(name: str, modules: Sequence[ModuleType]) -> Callable[..., Any]:
    """The op of that name in the first module that has it."""
    found: Callable[..., Any] = next(getattr(module, name) for module in modules if hasattr(module, name))
    return found


@cache
def _cuda() -> Sequence[ModuleType]:
    """The Triton kernels, imported by the first tensor that needs them; the eager path where there is no Triton."""
    try:
        return (importlib.import_module("wanquant.kernels.cuda"),)
    except ImportError as error:
        warnings.warn(f"CUDA runs without the kernels, exact but slow: {error}", stacklevel=2)
        return EAGER


def _on_cuda(name: str) -> Callable[..., Any]:
    def call(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device(x.device):  # Triton launches on the current device, whatever the tensor's
            return find(name, _cuda())(x, *args)

    return call


for _schema in SCHEMAS:
    _LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
for _name in NAMES:
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
for _name in ON_CUDA:
    _LIBRARY.impl(_name, _on_cuda(_name), "CUDA")
for _name in ON_NPU:
    _LIBRARY.impl(_name, getattr(npu, _name), "PrivateUse1")  # torch's key for devices of other packages
for _name in NAMES:
    _LIBRARY.impl(_name, find(_name, EAGER), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, getattr(cpu, _name), "CPU")
