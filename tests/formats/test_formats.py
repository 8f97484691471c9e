"""The formats to compare with, against ``ml_dtypes``, and what all formats promise."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from tests.kernels.inputs import ALL16, MATRICES
from wanquant import quantize_
from wanquant.formats.integer import Int8
from wanquant.formats.registry import FORMATS, get_format, register_format
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.scheme import parse, settle

EIGHT_BITS = [name for name, format_ in FORMATS.items() if not format_.keeps_all]
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
MINIFLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "mxfp8": ml_dtypes.float8_e4m3fn}


def assert_equal(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> None:
    """Values and signs, NaN beside NaN."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    np.testing.assert_array_equal(a, b)
    known = ~np.isnan(a)
    np.testing.assert_array_equal(np.signbit(a[known]), np.signbit(b[known]))


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloats_are_those_of_ml_dtypes(name: str) -> None:
    format_, dtype = get_format(name), MINIFLOATS[name]
    assert_equal(format_.decode(CODES, torch.float32), CODES.numpy().view(dtype).astype(np.float32))
    for x in (ALL16.view(torch.bfloat16).float(), ALL16.view(torch.float16).float(), MATRICES[0], MATRICES[1]):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = x.numpy().astype(dtype).astype(np.float32)
        assert_equal(format_.round(x, "inf"), expected)
        finite = np.where(x.isinf(), x.numpy(), np.clip(x.numpy(), -format_.target, format_.target))
        with np.errstate(over="ignore", invalid="ignore"):
            assert_equal(format_.round(x, "saturate"), finite.astype(dtype).astype(np.float32))


def test_int8_is_whole_numbers() -> None:
    format_ = get_format("int8")
    x = torch.tensor([0.0, -0.2, 0.5, 1.5, 2.5, -2.5, 126.5, 127.5, -200.0, 1e9])
    assert format_.round(x, "saturate").tolist() == [0, 0, 0, 2, 2, -2, 126, 127, -127, 127]
    assert not format_.round(x, "saturate").signbit()[:2].any()
    for broken in (torch.nan, torch.inf, -torch.inf):
        assert format_.round(torch.tensor([broken]), "saturate").isnan().all()
        with pytest.raises(ValueError, match="no code for what is not finite"):
            format_.encode(torch.tensor([broken]), "saturate")
    with pytest.raises(ValueError, match="int8 has no infinity"):
        format_.round(x, "inf")


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_every_format_promises(name: str) -> None:
    format_ = get_format(name)
    overflow = format_.default_overflow
    values = format_.decode(CODES, torch.float32)
    # Exact in BF16, and fixed points of rounding; -128, which symmetric INT8 does not use, is none.
    used = values.isfinite() & (values.abs() <= format_.target if name == "int8" else True)
    assert_equal(format_.decode(CODES).float(), values)
    assert_equal(format_.round(values[used], overflow), values[used])
    for x in (ALL16.view(torch.bfloat16), MATRICES[0]):
        x = x.nan_to_num(0.0, posinf=1.0, neginf=1.0)
        assert_equal(format_.decode(format_.encode(x, overflow), torch.float32), format_.round(x, overflow).float())
    below = torch.tensor(format_.overflow).nextafter(torch.tensor(0.0))
    largest = values[used].max()
    assert format_.round(below, overflow) == largest
    assert format_.round(-torch.tensor(format_.overflow), "saturate") == -largest
    assert format_.scaled_round(torch.tensor([[format_.overflow, below]]), torch.ones(()), overflow)[1] == 1


def test_mxfp8_is_microscaling() -> None:
    """OCP Microscaling 1.0 in NumPy and ``ml_dtypes``: shared exponents of 32 elements, E4M3 elements that saturate."""
    linear = nn.Linear(96, 8, dtype=torch.bfloat16)
    linear.weight.data.mul_(torch.logspace(-3, 3, 96))
    linear.weight.data[2, 32:64] = 0
    layer = QuantLinear.from_linear(linear, parse(QuantConfig(format="mxfp8")))
    blocks = linear.weight.detach().float().numpy().reshape(8, 3, 32)
    largest = np.abs(blocks).max(-1)
    shared = np.exp2(np.floor(np.log2(np.where(largest == 0, 256.0, largest).astype(np.float64))) - 8)
    scale = shared.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    elements = np.clip(blocks / scale[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert_equal(layer.weight_scale, scale)
    assert_equal(layer.weight.float(), elements.astype(np.float32).reshape(8, 96))
    assert_equal(layer.codes(), elements.view(np.uint8).reshape(8, 96))
    assert layer.overflowed > 0
    x = torch.randn(5, 96).to(torch.bfloat16)
    operand, x_scale = layer.quantize_input(x)
    dequantized = (operand.view(5, 3, 32).double() * x_scale[..., None].double()).view(5, 96)
    weight = (elements.astype(np.float64) * scale[..., None]).reshape(8, 96)
    expected = dequantized @ torch.from_numpy(weight).T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="blocks of 32"):
        QuantLinear.from_linear(nn.Linear(40, 8), parse(QuantConfig(format="mxfp8")))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_linear_in_every_format(name: str) -> None:
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    x = torch.randn(33, 128).to(torch.bfloat16)
    expected = linear(x).float()
    layers = [QuantLinear.from_linear(linear, parse(QuantConfig(format=name, packed=p))) for p in (False, True)]
    error = (layers[0](x).float() - expected).norm() / expected.norm()
    assert 0.001 < error < 0.1
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[1].is_packed
    assert torch.equal(layers[0].pack_().weight, layers[1].weight)
    unpacked = layers[1].unpack_().weight.clone()
    assert torch.equal(layers[0].unpack_().weight, unpacked)


def test_defaults_are_the_formats_own() -> None:
    settled = {name: settle(QuantConfig(format=name)) for name in EIGHT_BITS}
    rules = {name: config.weights.rule for name, config in settled.items()}
    assert rules == {"hif8": "amax/15", "e4m3": "amax/448", "e5m2": "amax/57344", "mxfp8": "mx", "int8": "amax/127"}
    assert settled["hif8"].overflow == "inf"
    assert settled["mxfp8"].activations.granularity == "per_block"
    with pytest.raises(ValueError, match="granularity is per_block"):
        parse(QuantConfig(format="mxfp8", weights=type(settled["hif8"].weights)("per_channel", "mx")))
    with pytest.raises(ValueError, match=r"quant\.overflow=inf: int8 has no infinity"):
        parse(QuantConfig(format="int8", overflow="inf"))


class Int4(Int8):
    """Whole numbers from -7 to 7, as a plug-in would add them."""

    name = "int4"
    overflow = 7.5
    target = 7.0

    def round(self, x: torch.Tensor, overflow: str) -> torch.Tensor:
        return super().round(x, overflow).clamp(-7, 7)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 16, dtype=torch.bfloat16)) for _ in range(2))


def test_a_format_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanquant.formats.registry.FORMATS", dict(FORMATS))
    register_format(Int4())
    with pytest.raises(ValueError, match="int4 is registered already"):
        register_format(Int4())
    with pytest.raises(ValueError, match=r"choose hif8, .*int4"):
        get_format("int5")
    model = Model()
    quantize_(model, QuantConfig(format="int4"), protected_blocks=(0,))
    assert type(model.blocks[0][0]) is nn.Linear
    assert set(model.blocks[1][0].weight.unique().tolist()) == set(range(-7, 8))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="did you mean int8"):
        get_format("int4")
