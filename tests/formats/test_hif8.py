"""HiF8 against the published table, the scalar reference and ``en_dtypes``, bit for bit."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import en_dtypes
import numpy as np
import pytest
import torch

from wanquant.formats import hif8, reference
from wanquant.kernels import eager

TABLE = list(csv.DictReader((Path(__file__).parent / "hif8_codes.csv").open()))
ALL16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    different = (bits(a) != bits(b)).nonzero()
    assert len(different) == 0, f"{len(different)} differ, first at {different[0].tolist()}"


def oracle(x: torch.Tensor) -> torch.Tensor:
    """``en_dtypes`` rounding of float32 values, with NaN made the canonical one and -0 made +0."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = x.numpy().astype(en_dtypes.hifloat8).astype(np.float32)
    out = torch.from_numpy(values)
    out = torch.where(out == 0, torch.zeros(()), out)
    return torch.where(out.isnan(), torch.tensor(float("nan")), out)


def saturated(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(rounded.isinf() & ~x.isinf(), rounded.sign() * 32768.0, rounded)


def hard_float32() -> torch.Tensor:
    """2^24 float32 values: every HiF8 value, every midpoint and their neighbours, specials, the rest random bits."""
    finite = sorted({abs(reference.decode(c)) for c in range(256) if abs(reference.decode(c)) <= 32768.0})
    edges = [*finite, 40960.0, 2.0**-23, *((a + b) / 2 for a, b in itertools.pairwise(finite))]
    near = torch.tensor(edges, dtype=torch.float32).view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    near = near.clamp_min(0).flatten().view(torch.float32)
    special = torch.tensor([0.0, float("inf"), float("nan"), 1e-45, 3.4e38, 2.0**-126])
    positive = torch.cat([near, special])
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**24 - 2 * len(positive),), generator=generator).to(torch.int32)
    return torch.cat([positive, -positive, random.view(torch.float32)])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["code"])
def test_every_code_decodes_and_encodes_as_published(row: dict[str, str]) -> None:
    code = int(row["code"], 16)
    value = float(row["value"])
    np.testing.assert_equal(reference.decode(code), value)
    for dtype in DTYPES:
        decoded = hif8.decode(torch.tensor([code], dtype=torch.uint8), dtype)
        np.testing.assert_equal(decoded.item(), value)
        assert hif8.encode(decoded).item() == code
    assert reference.encode(value) == code


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_inputs(dtype: torch.dtype, overflow: str) -> None:
    x = ALL16.view(dtype)
    expected = oracle(x.float())
    if overflow == "saturate":
        expected = saturated(expected, x)
    assert_same_bits(hif8.round(x, overflow), eager.narrow(expected, dtype))
    scalar = torch.tensor([reference.round(v, overflow) for v in x.tolist()])
    assert_same_bits(scalar.where(~scalar.isnan(), float("nan")), expected)


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_float32_inputs(overflow: str) -> None:
    x = hard_float32()
    expected = oracle(x)
    if overflow == "saturate":
        expected = saturated(expected, x)
    assert len(x) == 2**24
    rounded = hif8.round(x, overflow)
    assert_same_bits(rounded, expected)
    assert_same_bits(hif8.decode(hif8.encode(x, overflow), torch.float32), rounded)
    scalar = torch.tensor([reference.round(v, overflow) for v in x[:10_000].tolist()])
    assert_same_bits(scalar.where(~scalar.isnan(), float("nan")), expected[:10_000])


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_kernel_equals_compiled(dtype: torch.dtype, overflow: str) -> None:
    x = hard_float32()[: 2**20] if dtype == torch.float32 else ALL16.view(dtype)
    assert_same_bits(eager.round_hif8(x, overflow == "saturate"), hif8.round(x, overflow))
    codes = hif8.encode(x, overflow)
    assert torch.equal(eager.encode_hif8(x, overflow == "saturate"), codes)
    assert_same_bits(eager.decode_hif8(codes, dtype), hif8.decode(codes, dtype))
    assert_same_bits(hif8.decode(codes, dtype), hif8.round(x, overflow))


def test_shapes_layouts_and_out() -> None:
    x = torch.randn(6, 5, 4).to(torch.bfloat16)
    assert_same_bits(hif8.round(x.transpose(0, 2)), hif8.round(x).transpose(0, 2).contiguous())
    assert hif8.round(torch.tensor(1.06)).item() == 1.0
    assert hif8.round(torch.empty(0, 3)).shape == (0, 3)
    assert hif8.encode(torch.empty(0)).dtype == torch.uint8
    out = torch.empty_like(x)
    assert hif8.round(x, out=out) is out
    assert_same_bits(out, hif8.round(x))
    strided = torch.empty(4, 5, 6, dtype=torch.bfloat16).transpose(0, 2)
    hif8.round(x, out=strided)
    assert torch.equal(strided, out)
    in_place = x.clone()
    hif8.round(in_place, out=in_place)
    assert torch.equal(in_place, out)


def test_threads_do_not_change_the_result() -> None:
    x = torch.randn(513, 1031)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = hif8.round(x)
        torch.set_num_threads(3)
        assert_same_bits(hif8.round(x), one)
    finally:
        torch.set_num_threads(before)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="float64"):
        hif8.round(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="clamp"):
        reference.round(1.0, overflow="clamp")
    with pytest.raises(ValueError, match="clamp"):
        hif8.round(torch.zeros(2), overflow="clamp")
    with pytest.raises(ValueError, match="out must be"):
        hif8.round(torch.zeros(2), out=torch.zeros(3))
    with pytest.raises(TypeError, match="uint8"):
        hif8.decode(torch.zeros(2))
    with pytest.raises(TypeError, match="int32"):
        hif8.decode(torch.zeros(2, dtype=torch.uint8), torch.int32)


def test_no_autograd() -> None:
    x = torch.randn(4, requires_grad=True)
    assert not hif8.round(x).requires_grad


def test_stochastic_rounding_is_unbiased() -> None:
    """Means of a million draws: within 5 standard errors of x, in every zone of the format."""
    generator = torch.Generator().manual_seed(3)
    draws = 1 << 20
    for value in (
        1.03,
        -1.03,
        7.3,
        17.0,
        200.0,
        -300.0,
        20_000.0,
        2.0**-9 * 1.3,
        2.0**-19 * 1.7,
        2.0**-24 * 1.3,
        2.0**-30,
    ):
        got = hif8.round_stochastic(torch.full((draws,), value), generator).double()
        found = got.unique()
        assert len(found) <= 2
        assert torch.equal(hif8.round(found.float()).double(), found)
        spread = float(found.max() - found.min())
        assert abs(float(got.mean()) - value) <= 5 * spread / 2 / draws**0.5
        assert float(found.min()) <= value <= float(found.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_repeats_and_keeps_what_is_on_the_grid(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 1000) * torch.logspace(-4, 3, 1000)).to(dtype)
    a, b = (hif8.round_stochastic(x, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert_same_bits(a, b)
    other = hif8.round_stochastic(x, torch.Generator().manual_seed(2))
    assert 0.05 < (other != a).float().mean() < 0.6
    on_grid = hif8.decode(torch.arange(256, dtype=torch.int32).to(torch.uint8), dtype)
    assert_same_bits(hif8.round_stochastic(on_grid), hif8.round(on_grid))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e38 if dtype != torch.float16 else 6e4]).to(dtype)
    assert_same_bits(hif8.round_stochastic(special), hif8.round(special))
    assert_same_bits(hif8.round_stochastic(special, overflow="saturate"), hif8.round(special, "saturate"))
