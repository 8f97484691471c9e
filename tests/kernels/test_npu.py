"""The NPU path as far as it can be tested without one."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from tests.kernels.inputs import WIDE, assert_same_bits
from wanquant.kernels import check_native, eager, npu

CPU = torch.device("cpu")


def test_a_chip_without_the_cast_gets_the_eager_path() -> None:
    assert not npu.casts_exactly(CPU, False)
    assert not npu.multiplies(CPU)
    for saturate in (False, True):
        assert_same_bits(npu.round_hif8(WIDE, saturate), eager.round_hif8(WIDE, saturate))
        assert torch.equal(npu.encode_hif8(WIDE, saturate), eager.encode_hif8(WIDE, saturate))
        got, expected = (module.quantize_rows_hif8(WIDE, 15.0, False, saturate) for module in (npu, eager))
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


def test_a_native_product_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="cpu has no HiF8 matrix product of its own"):
        check_native(CPU)


def called_with(name: str) -> set[str]:
    """The keywords with which ``wanquant.kernels.npu`` calls a function of torch_npu."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(npu))) if isinstance(node, ast.Call)]
    found = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == name]
    assert found
    return {keyword.arg for call in found for keyword in call.keywords if keyword.arg}


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
@pytest.mark.parametrize("name", ["npu_dtype_cast", "npu_quant_matmul"])
def test_calls_fit_the_signatures_of_the_wheel(name: str) -> None:
    """Read from its sources: importing it needs CANN."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "op_plugin" / "meta" / "_meta_registrations.py"
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef) and f'"{name}"' in "".join(map(ast.unparse, node.decorator_list)).replace(
            "'", '"'
        ):
            known = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            assert called_with(name) <= known
            return
    raise AssertionError(f"torch_npu has no {name}")
