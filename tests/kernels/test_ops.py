"""The registered ops: every device's implementation against the eager one, shapes, compilation, autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.kernels.inputs import ALL16, LARGE, MATRICES, WIDE, assert_same_bits
from tests.models import wan_inputs, wan_transformer
from wanquant import kernels
from wanquant.formats import hif8
from wanquant.formats.blocks import NVFP4
from wanquant.kernels import cpu, eager, ops
from wanquant.kernels.tables import NAN16, NAN_CODE, narrow
from wanquant.quant import QuantConfig, QuantLinear, quantize_
from wanquant.quant.scheme import parse

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def test_large_tensors_go_through_eager_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what they are in one."""

    def all_of_them() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for x in MATRICES:
            factors = torch.exp2(torch.arange(x.shape[1]) % 5 - 2.0)
            for scale in (torch.tensor(0.37), torch.arange(1, len(x) + 1) / 9):
                found += eager.scaled_round_hif8(x, scale, False, factors)
            for saturate in (False, True):
                codes = eager.encode_hif8(x.t(), saturate)
                found += [eager.round_hif8(x, saturate), codes, eager.decode_hif8(codes, torch.bfloat16)]
                found += eager.quantize_rows_hif8(x.bfloat16(), 15.0, saturate, saturate, factors)
            columns = torch.arange(x.shape[1]) / 7
            found += [eager.descale(x, s, columns, columns, torch.bfloat16) for s in (torch.tensor(0.5), x[:, 0])]
        return found

    whole = all_of_them()
    monkeypatch.setattr(eager, "AT_ONCE", 1000)
    for a, b in zip(whole, all_of_them(), strict=True):
        assert_same_bits(a, b)


def test_every_device_has_every_op() -> None:
    for modules in ((cpu,), ops.EAGER):
        assert all(callable(ops.find(name, modules)) for name in ops.NAMES)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_cpu_equals_eager(dtype: torch.dtype, saturate: bool) -> None:
    noise = torch.randint(-(2**31), 2**31, WIDE.shape, dtype=torch.int32)
    x = WIDE.to(dtype)
    assert_same_bits(cpu.round_hif8_stochastic(x, noise, saturate), eager.round_hif8_stochastic(x, noise, saturate))
    for x in (matrix.to(dtype) for matrix in MATRICES):
        for power_of_two in (False, True):
            got = cpu.quantize_rows_hif8(x, 15.0, power_of_two, saturate)
            expected = eager.quantize_rows_hif8(x, 15.0, power_of_two, saturate)
            assert_same_bits(got[0], expected[0])
            assert_same_bits(got[1], expected[1])
        for scale in (torch.tensor(0.37), torch.rand(len(x)) + 0.01):
            got = cpu.scaled_round_hif8(x, scale, saturate)
            expected = eager.scaled_round_hif8(x, scale, saturate)
            assert_same_bits(got[0], expected[0])
            assert got[1] == expected[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_several_threads_equal_eager(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(3)
    x, noise = LARGE.to(dtype), torch.randint(-(2**31), 2**31, LARGE.shape, dtype=torch.int32)
    scales, columns = torch.rand(len(x)) + 0.01, torch.rand(x.shape[1])
    codes = eager.encode_hif8(x, False)
    calls = {
        "round_hif8": (x, False),
        "round_hif8_stochastic": (x, noise, False),
        "encode_hif8": (x, False),
        "decode_hif8": (codes, dtype),
        "absmax_rows": (x,),
        "scaled_round_hif8": (x, scales, False),
        "quantize_rows_hif8": (x, 15.0, False, False),
        "descale": (x, scales, columns, columns.to(torch.bfloat16), torch.bfloat16),
    }
    for name, args in calls.items():
        got, expected = (getattr(module, name)(*args) for module in (cpu, eager))
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
            assert_same_bits(a, b)


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """Round, encode and decode 2^31 + 5 values, 13 GB: those at both ends, and either side of 2^31."""
    count = 2**31 + 5
    places = torch.tensor([0, 1, 2**31 - 1, 2**31, count - 1])
    values = torch.tensor([1.3, -500.0, 3e-6, torch.inf, 0.77]).to(torch.bfloat16)
    x = torch.zeros(count, dtype=torch.bfloat16)
    x[places] = values
    codes = hif8.encode(x)
    assert torch.equal(codes[places], hif8.encode(values))
    assert codes.count_nonzero() == len(places)
    assert hif8.round(x, out=x) is x
    assert torch.equal(x[places], hif8.round(values))
    x.zero_()
    x.copy_(hif8.decode(codes))
    assert torch.equal(x[places], hif8.round(values))
    assert x.count_nonzero() == len(places)
    del codes
    values[3] = 70.0
    x[places] = values
    row, scale = kernels.quantize_rows_hif8(x[None], 15.0, False)
    expected = eager.quantize_rows_hif8(values[None], 15.0, False, False)
    assert torch.equal(scale, expected[1])
    assert torch.equal(row[0, places], expected[0][0])
    assert row.count_nonzero() == expected[0].count_nonzero()


@pytest.mark.parametrize("bias", [None, torch.randn(48).to(torch.bfloat16)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_descale_equals_eager(product: torch.dtype, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    x = (torch.randn(33, 48) * 100).to(product)
    for row_scale in (torch.tensor(0.3), torch.rand(33)):
        for column_scale in (torch.tensor(0.7), torch.rand(48)):
            got = cpu.descale(x, row_scale, column_scale, bias, dtype)
            assert_same_bits(got, eager.descale(x, row_scale, column_scale, bias, dtype))


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("columns", [0, 1, 48])
def test_small_and_empty_matrices(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    for module in (cpu, eager):
        values, scale = module.quantize_rows_hif8(x, 15.0, False, False)
        assert values.shape == x.shape
        assert scale.shape == (rows,)
        assert module.absmax_rows(x).shape == (rows,)


@pytest.mark.parametrize("strided", [False, True])
def test_layout_does_not_matter(strided: bool) -> None:
    x = torch.randn(40, 30).to(torch.bfloat16)
    view = x.T if strided else x[::2, 3:]
    whole = view.contiguous()
    assert_same_bits(
        cpu.quantize_rows_hif8(view, 15.0, False, False)[0], cpu.quantize_rows_hif8(whole, 15.0, False, False)[0]
    )
    assert_same_bits(cpu.absmax_rows(view), cpu.absmax_rows(whole))
    assert torch.equal(cpu.encode_hif8(view, False), cpu.encode_hif8(whole, False))


def test_ops_keep_their_contract() -> None:
    """torch's own check: schema, mutation, shapes under FakeTensorMode, AOT dispatch."""
    x, codes = torch.randn(6, 32), torch.arange(64, dtype=torch.uint8)
    calls = {
        "split_blocks": (torch.ones(6, 32, dtype=torch.bfloat16), *NVFP4.how[:-1], NVFP4.bits),
        "round_hif8": (x, False),
        "round_hif8_out": (x, False, torch.empty_like(x)),
        "round_hif8_stochastic": (x, torch.zeros(6, 32, dtype=torch.int32), True),
        "encode_hif8": (x.to(torch.bfloat16), True),
        "decode_hif8": (codes, torch.bfloat16),
        "absmax_rows": (x,),
        "scaled_round_hif8": (x, torch.rand(6), False),
        "quantize_rows_hif8": (x, 15.0, True, False),
        "descale": (x, torch.rand(6), torch.rand(32), None, torch.bfloat16),
        "look_up": (codes, torch.rand(256)),
        "carry_e4m3": (torch.ones(6, 32, dtype=torch.bfloat16), 16.0),
        "quantize_rows_coded": (x, eager.CODED_HIF8, 15.0, False, 16.0, 256.0),
        "round_blocks": (x, torch.rand(6), *NVFP4.how),
    }
    assert set(calls) == set(ops.NAMES)
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.wanquant, name).default, args)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(packed=True, product="exact"),
        QuantConfig(format="e4m3"),
        QuantConfig(format="mxfp8"),
        QuantConfig(format="hif4", packed=True),
    ],
    ids=["hif8", "packed", "e4m3", "mxfp8", "hif4"],
)
def test_a_quantized_linear_compiles_whole(config: QuantConfig) -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 48, dtype=torch.bfloat16), parse(config))
    x = torch.randn(3, 7, 64).to(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), layer(x))


def test_a_static_linear_counts_overflow_when_compiled() -> None:
    config = QuantConfig()
    config.activations.granularity, config.activations.static = "per_tensor", True
    layer = QuantLinear.from_linear(nn.Linear(16, 8, dtype=torch.bfloat16), parse(config), seen=15.0)
    x = torch.full((2, 16), 1e5).to(torch.bfloat16)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert layer.overflowed == 32


def test_a_quantized_transformer_compiles_whole() -> None:
    model = wan_transformer(1)
    quantize_(model)
    inputs = wan_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).sample
    assert_same_bits(got, expected)


def test_autograd_falls_through() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert not hif8.round(x).requires_grad
    assert not hif8.encode(x).requires_grad
    assert not torch.ops.wanquant.quantize_rows_hif8(x, 15.0, False, False)[0].requires_grad


def test_out_when_compiled_and_on_meta() -> None:
    x, out = torch.randn(8, 6), torch.empty(8, 6)
    compiled = torch.compile(lambda a, b: hif8.round(a, out=b), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, out), hif8.round(x))
    assert_same_bits(out, hif8.round(x))
    meta = torch.empty(8, 6, device="meta")
    hif8.round(meta, out=torch.empty(6, 8, device="meta").T)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(5, dtype=torch.bfloat16), "scales are float32"),
        (torch.ones(5, 1), "not \\(5, 1\\)"),
        (torch.ones(4), "not \\(4,\\)"),
        (torch.ones(5, device="meta"), "scales are on meta"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale: torch.Tensor, message: str) -> None:
    """The kernels read addresses, and would read whatever lies there."""
    x = torch.randn(5, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.scaled_round_hif8(x, scale)
    for scales in ((scale, torch.ones(5)), (torch.ones(5), scale)):
        with pytest.raises((TypeError, ValueError), match=message):
            kernels.descale(x, *scales, None, torch.bfloat16)


def test_matrices_and_biases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        kernels.absmax_rows(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="a matrix"):
        kernels.quantize_rows_hif8(torch.ones(4), 15.0, False)
    with pytest.raises(ValueError, match="the bias has to be"):
        kernels.descale(torch.ones(2, 3), torch.ones(2), torch.ones(3), torch.ones(2), torch.bfloat16)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        kernels.descale(torch.ones(2, 3), torch.ones(2), torch.ones(3), torch.ones(3).double(), torch.bfloat16)


def test_powers_of_two_down_to_the_smallest() -> None:
    exponents = torch.arange(-149, 128)
    assert kernels.two_to(exponents).tolist() == [2.0**k for k in range(-149, 128)]


def test_out_may_be_x_but_not_overlap_it() -> None:
    x = torch.randn(100)
    with pytest.raises(ValueError, match="overlaps"):
        hif8.round(x[:-1], out=x[1:])
    with pytest.raises(ValueError, match="overlaps"):
        hif8.round(x.view(10, 10), out=x.view(10, 10).T)
    expected = hif8.round(x[:50])
    hif8.round(x[:50], out=x[50:])
    assert torch.equal(x[50:], expected)
    hif8.round(x[:50], out=x[:50])
    assert torch.equal(x[:50], expected)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("device", [cpu, eager])
def test_the_nan_of_float16_has_the_same_bits_everywhere(device: ModuleType, saturate: bool) -> None:
    """A card casts a float32 NaN to 0x7FFF, a CPU to 0x7E00, and some keep its sign and payload."""
    x = ALL16.view(torch.float16)
    out = torch.empty_like(x)
    device.round_hif8_out(x, saturate, out)
    noise = torch.zeros(x.shape, dtype=torch.int32)
    found = [out, device.round_hif8(x, saturate), device.round_hif8_stochastic(x, noise, saturate)]
    for rounded in found:
        assert set(rounded[x.isnan()].view(torch.int16).tolist()) == {NAN16}
        assert torch.equal(rounded.isnan(), x.isnan())
    codes = torch.full((3,), NAN_CODE, dtype=torch.uint8)
    assert device.decode_hif8(codes, torch.float16).view(torch.int16).tolist() == [NAN16] * 3
    payloads = torch.randint(1, 1 << 23, (1000,)).int() | 0x7F800000
    for sign in (0, -(2**31)):
        assert set(narrow((payloads | sign).view(torch.float32), torch.float16).view(torch.int16).tolist()) == {NAN16}


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_triton_equals_eager_under_its_interpreter(which: str) -> None:
    """In a process of its own, because the interpreter has to be asked for before Triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_check", which],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all equal\n")
