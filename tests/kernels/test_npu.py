"""The NPU path as far as it can be tested without one."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from tests.kernels.inputs import WIDE, assert_same_bits
from wanquant.evaluate.judges.examine import chip_lines
from wanquant.kernels import check_native, eager, npu

CPU = torch.device("cpu")
#: The functions of torch_npu that are called, as its 2.14.0 declares them.
SIGNATURES = {
    "npu_dtype_cast": "self, dtype, input_dtype=None",
    "npu_quant_matmul": "x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, "
    "x1_dtype=None, x2_dtype=None, pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None, y_scale=None",
}


@pytest.fixture(autouse=True)
def _try_again():
    """A trial is remembered for the process."""
    npu.casts_exactly.cache_clear()
    yield
    npu.casts_exactly.cache_clear()


def test_the_doctor_says_what_a_chip_has() -> None:
    lines = chip_lines(CPU)
    assert "  HiF8 from bfloat16, overflow=inf: integer arithmetic" in lines
    assert "  product=native: no" in lines
    assert sum("slower integer path" in line for line in lines) == 4


@pytest.mark.filterwarnings("ignore:HiF8 from")
def test_a_chip_without_the_cast_gets_the_eager_path() -> None:
    assert not npu.multiplies(CPU)
    for saturate in (False, True):
        assert_same_bits(npu.round_hif8(WIDE, saturate), eager.round_hif8(WIDE, saturate))
        assert torch.equal(npu.encode_hif8(WIDE, saturate), eager.encode_hif8(WIDE, saturate))
        got, expected = (module.quantize_rows_hif8(WIDE, 15.0, False, saturate) for module in (npu, eager))
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


def test_the_eager_path_says_why() -> None:
    with pytest.warns(UserWarning, match=r"HiF8 from float32 on cpu runs on the slower integer path: .*torch_npu"):
        assert not npu.casts_exactly(CPU, torch.float32, False)


def test_a_cast_is_used_where_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip that overflows to infinity: its cast serves that mode and is not taken for the other."""
    monkeypatch.setattr(npu, "_cast", lambda x: eager.encode_hif8(x, False))
    assert npu.casts_exactly(CPU, torch.float32, False)
    assert npu.casts_exactly(CPU, torch.bfloat16, False)
    with pytest.warns(UserWarning, match="saturating, on cpu .* gives another code for"):
        assert not npu.casts_exactly(CPU, torch.float32, True)
    got, expected = (module.scaled_round_hif8(WIDE, torch.tensor(0.3), False) for module in (npu, eager))
    assert_same_bits(got[0], expected[0])
    assert got[1] == expected[1]


def test_a_cast_by_way_of_bfloat16_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right for every BF16 pattern and rounds other float32 values twice."""
    monkeypatch.setattr(npu, "_cast", lambda x: eager.encode_hif8(x.to(torch.bfloat16), False))
    assert npu.casts_exactly(CPU, torch.bfloat16, False)
    with pytest.warns(UserWarning, match="gives another code for"):
        assert not npu.casts_exactly(CPU, torch.float32, False)


def test_a_native_product_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="cpu has no HiF8 matrix product of its own"):
        check_native(CPU)


def calls_of(name: str) -> list[ast.Call]:
    """Where ``wanquant.kernels.npu`` calls a function of torch_npu."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(npu))) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_calls_fit_the_signatures(name: str) -> None:
    declared: dict[str, object] = {}
    exec(f"def declared({SIGNATURES[name]}): ...", declared)
    assert calls_of(name)
    for call in calls_of(name):
        given = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(declared["declared"]).bind(*call.args, **given)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed")
def test_the_wheel_declares_them_so() -> None:
    """Read from its sources: importing it needs CANN."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "op_plugin" / "meta" / "_meta_registrations.py"
    text = source.read_text()
    declared = {
        name: ast.unparse(node.args)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        for name in SIGNATURES
        if any(f"'{name}'" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    wanted = {name: ast.unparse(ast.parse(f"def f({text}): ...").body[0].args) for name, text in SIGNATURES.items()}
    assert declared == wanted
    assert "torch_npu.hifloat8" in text
