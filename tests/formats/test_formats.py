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
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear
from wanquant.quant.scheme import parse, settle

ROUNDING = [name for name, format_ in FORMATS.items() if not format_.keeps_all]
#: Of a code for each element; ``test_blocks`` has the others.
ELEMENTWISE = [name for name in ROUNDING if not get_format(name).block]
CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
MINIFLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


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


@pytest.mark.parametrize("name", ELEMENTWISE)
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


@pytest.mark.parametrize("name", ROUNDING)
def test_a_linear_in_every_format(name: str) -> None:
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    x = torch.randn(33, 128).to(torch.bfloat16)
    expected = linear(x).float()
    layers = [QuantLinear.from_linear(linear, parse(QuantConfig(format=name, packed=p)), 5.0) for p in (False, True)]
    error = (layers[0](x).float() - expected).norm() / expected.norm()
    assert 0.001 < error < (0.25 if get_format(name).bits == 4 else 0.1)
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[1].is_packed
    assert layers[1].weight.shape == (64, get_format(name).row_bytes(128))
    assert torch.equal(layers[0].pack_().weight, layers[1].weight)
    unpacked = layers[1].unpack_().weight.clone()
    assert torch.equal(layers[0].unpack_().weight, unpacked)


def test_defaults_are_the_formats_own() -> None:
    settled = {name: settle(QuantConfig(format=name)) for name in ROUNDING}
    weights = {name: (config.weights.granularity, config.weights.rule) for name, config in settled.items()}
    scaled = {"hif8": "amax/15", "e4m3": "amax/448", "e5m2": "amax/57344", "int8": "amax/127"}
    of_blocks = {"nvfp4": "amax/2688", **dict.fromkeys(set(ROUNDING) - {*scaled, "nvfp4"}, "direct")}
    assert weights == {
        **{name: ("per_channel", rule) for name, rule in scaled.items()},
        **{name: ("per_tensor", rule) for name, rule in of_blocks.items()},
    }
    assert settled["hif8"].overflow == "inf"
    assert settled["mxfp8"].activations.granularity == "per_tensor"
    mixed = settle(QuantConfig(format="nvfp4", activations=ActivationConfig(format="e4m3")))
    assert (mixed.activations.granularity, mixed.activations.rule) == ("per_token", "amax/448")
    for format_, what in (("int8", "int8"), ("hif4", "hif4")):
        with pytest.raises(ValueError, match=rf"quant\.overflow=inf: {what} has no infinity"):
            parse(QuantConfig(format=format_, overflow="inf"))


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
    with pytest.raises(ValueError, match="did you mean int4_g64 or int4_g128"):
        get_format("int4")
