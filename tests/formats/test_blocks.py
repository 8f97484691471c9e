"""Formats in which a block shares a scale: the tensor functions against the scalar reference, values and codes against
``ml_dtypes``, and what is packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.kernels.inputs import assert_same_bits
from wanquant import kernels
from wanquant.formats import block_reference
from wanquant.formats.blocks import BlockFormat
from wanquant.formats.registry import FORMATS
from wanquant.kernels import blocks as eager

FORMATS_OF_BLOCKS = {name: each for name, each in FORMATS.items() if isinstance(each, BlockFormat)}
REFERENCES: dict[str, Callable[[list[float]], list[float]]] = {
    "nvfp4": block_reference.nvfp4,
    "mxfp4": partial(block_reference.mx, mantissa=1, least=0, top=6.0),
    "mxfp6": partial(block_reference.mx, mantissa=2, least=-2, top=28.0),
    "mxfp8": partial(block_reference.mx, mantissa=3, least=-6, top=448.0),
    "hif4": block_reference.hif4,
    "int4_g64": block_reference.int4,
    "int4_g128": block_reference.int4,
}
#: The element of each but HiF4 and INT4.
ELEMENTS = {
    "nvfp4": ml_dtypes.float4_e2m1fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6": ml_dtypes.float6_e3m2fn,
    "mxfp8": ml_dtypes.float8_e4m3fn,
}
ONE = torch.ones(())
#: Bits of a value with its share of the scale, and the largest value without a scale outside.
SIZES = {
    "nvfp4": (4.5, 448 * 6.0),
    "mxfp4": (4.25, math.inf),
    "mxfp6": (6.25, math.inf),
    "mxfp8": (8.25, math.inf),
    "hif4": (4.5, 49152 * 4 * 1.75),
    "int4_g64": (4.25, math.inf),
    "int4_g128": (4.125, math.inf),
}
each_format = pytest.mark.parametrize("name", FORMATS_OF_BLOCKS)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Of packed values, in which a NaN may be any."""
    assert_same_bits(a.masked_fill(a.isnan(), torch.nan), b.masked_fill(b.isnan(), torch.nan))


def inputs() -> Iterator[torch.Tensor]:
    """Matrices of 256 columns."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(12, 256, generator=generator)
    yield plain
    yield plain * torch.exp2(torch.randint(-149, 127, (12, 1), generator=generator).float())
    yield plain * torch.exp2(torch.randint(-40, 20, (12, 256), generator=generator).float())
    # Ties of each grid: the largest magnitude makes the scale 1, and a power of two below and above it.
    ties = torch.arange(-128, 128).repeat(12, 1) / torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0, 128.0] * 2)[:, None]
    top = torch.tensor([7.0, 6.0, 448.0, 28.0, 3.5, 14.0])
    ties[6:] = ties[6:, torch.randperm(256, generator=generator)]
    for power in (-3, 0, 1):
        marked = ties.clone()
        marked[:, ::16] = (top * 2.0**power).repeat(2)[:, None]
        yield marked
    special = plain.clone()
    special[0], special[1] = 0.0, -0.0
    special[2, ::2] = 0.0
    special[3, 130], special[4, 130], special[5, 5] = math.nan, math.inf, -math.inf
    special[6] *= 1e-41  # subnormal
    special[7, 0] = 1e-45
    special[8] *= 1e7  # beyond the largest scale of NVFP4 and HiF4
    special[9, 3] = 3e38
    special[10] *= 2.0**-9  # NVFP4's scales are subnormal E4M3
    special[11] *= 2.0**-51  # below HiF4's smallest level
    yield special


def reference(name: str, x: torch.Tensor) -> torch.Tensor:
    size, round_ = FORMATS_OF_BLOCKS[name].block, REFERENCES[name]
    values = [[value for i in range(0, len(row), size) for value in round_(row[i : i + size])] for row in x.tolist()]
    found = torch.tensor(values, dtype=torch.float64).to(torch.bfloat16)
    return found.masked_fill(found.isnan(), torch.nan)


@each_format
def test_the_tensor_functions_are_the_reference(name: str) -> None:
    """The loops of the CPU and the plain one, on every type they take."""
    how = FORMATS_OF_BLOCKS[name].how
    for x in inputs():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = x.to(dtype)
            rounded, over = torch.ops.wanquant.round_blocks(given, ONE, *how, None)
            plain, plain_over = eager.round_blocks(given, ONE, *how)
            assert_same_bits(rounded, plain)
            assert over == plain_over
            assert_same_bits(rounded, reference(name, given))


def to_nearest(x: np.ndarray, dtype: type) -> np.ndarray:
    return x.astype(dtype).astype(np.float32)


def quantized(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By NumPy and ``ml_dtypes``, of blocks [count, block] in float32: values, elements' codes, bytes of the scales."""
    absmax = np.abs(x).max(1, keepdims=True)
    if name == "hif4":
        return quantized_hif4(x, absmax)
    if name.startswith("int4"):
        scale = (absmax / np.float32(7)).astype(ml_dtypes.bfloat16)
        wide = scale.astype(np.float32)
        whole = np.clip(np.rint(x / np.where(wide == 0, 1, wide)), -7, 7)
        return to_nearest(whole * wide, ml_dtypes.bfloat16), whole.astype(np.int8).view(np.uint8) & 15, scale
    dtype = ELEMENTS[name]
    top = float(ml_dtypes.finfo(dtype).max)
    if name == "nvfp4":
        scale = np.minimum(absmax / np.float32(6), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    else:
        shared = np.floor(np.log2(np.where(absmax == 0, 2.0**-127, absmax.astype(np.float64)))) - math.floor(
            math.log2(top)
        )
        scale = np.exp2(np.maximum(shared, -127)).astype(ml_dtypes.float8_e8m0fnu)
    wide = scale.astype(np.float32)
    elements = np.clip(x / np.where(wide == 0, np.inf, wide), -top, top).astype(dtype)
    return elements.astype(np.float32) * wide, elements.view(np.uint8), scale


def quantized_hif4(x: np.ndarray, absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whose first level is found on the bits of BF16: two of its seven mantissa bits are kept."""
    seventh = (absmax * np.float32(ml_dtypes.bfloat16(1 / 7))).astype(ml_dtypes.bfloat16)
    bits = seventh.view(np.uint16).astype(np.int32)
    code = ((bits + 15 + (bits >> 5 & 1)) >> 5) - 4 * (127 - 48)
    code = np.clip(code, 0, 254)
    level = np.ldexp(1 + (code & 3) / 4, (code >> 2) - 48).astype(np.float32)
    reciprocal = (1 / level).astype(ml_dtypes.bfloat16).astype(np.float32)
    scaled = np.abs(x) * reciprocal
    second = scaled.reshape(-1, 8, 8).max(2) >= 4
    scaled /= np.repeat(1 + second, 8, axis=1)
    third = scaled.reshape(-1, 16, 4).max(2) >= 2
    scaled /= np.repeat(1 + third, 4, axis=1)
    magnitude = np.minimum(np.floor(scaled * 4 + np.float32(0.5)), 7)
    power = np.repeat(1 + second, 8, axis=1) * np.repeat(1 + third, 4, axis=1)
    values = np.copysign(magnitude / 4 * level * power, x).astype(np.float32)
    packed = [np.packbits(flags, axis=1, bitorder="little") for flags in (second, third)]
    codes = magnitude.astype(np.uint8) | np.signbit(x).astype(np.uint8) << 3
    return values, codes, np.concatenate([code.astype(np.uint8), *packed], axis=1)


def joined(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] one behind the other, the first in the lowest bits."""
    single = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")


@each_format
def test_values_and_bytes_are_those_of_ml_dtypes(name: str) -> None:
    format_ = FORMATS_OF_BLOCKS[name]
    for x in inputs():
        finite = torch.where(x.abs() < 1e30, x, 0.0)
        blocks = finite.numpy().reshape(-1, format_.block)
        values, codes, scales = quantized(name, blocks)
        rounded, _ = format_.scaled_round(finite, ONE, "saturate")
        found = rounded.float().numpy()
        expected = to_nearest(values, ml_dtypes.bfloat16).reshape(found.shape)
        np.testing.assert_array_equal(found, expected)
        if format_.kind != kernels.SCALE_BF16:
            np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
        packed = format_.pack(rounded)
        assert_same_bits(format_.decode(packed), rounded)
        elements = joined(codes.reshape(len(x), -1), format_.bits)
        theirs = np.concatenate([elements, scales.reshape(len(x), -1).view(np.uint8)], axis=1)
        assert packed.shape == theirs.shape
        assert_same_bits(format_.decode(torch.from_numpy(theirs)), rounded)
        highest = finite.abs().amax(1).numpy()
        same = (packed.numpy() == theirs).all(1)[(highest == 0) | (highest > 1e-35)]  # BF16 has all of their elements
        # HiF4 has several codes of some blocks: 0.5 doubled is 1.
        assert same.mean() > 0.3 if name == "hif4" else same.all()


def codes_of_scales(format_: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of scales [count, bytes], every one of those of a byte, and what they are, float64 [count, block]."""
    every = np.arange(256, dtype=np.uint8)[:, None]
    if format_.kind == kernels.SCALE_HIF4:
        powers = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
        level = np.where(every == 255, np.nan, np.ldexp(1 + (every & 3) / 4, (every >> 2).astype(np.int64) - 48))
        bits = np.unpackbits(powers, axis=1, bitorder="little").astype(np.int64)
        shift = np.repeat(bits[:, :8], 8, axis=1) + np.repeat(bits[:, 8:], 4, axis=1)
        return torch.from_numpy(np.hstack([every, powers])), torch.from_numpy(level * 2.0**shift)
    if format_.kind == kernels.SCALE_BF16:
        words = np.arange(0, 0x7FC1, 13, dtype=np.uint16)[:, None]  # positive ones, infinity and a NaN
        known = words.view(ml_dtypes.bfloat16)
    else:
        words = every
        known = every.view(ml_dtypes.float8_e4m3fn if format_.kind == kernels.SCALE_E4M3 else ml_dtypes.float8_e8m0fnu)
    with np.errstate(invalid="ignore"):
        wide = torch.from_numpy(known.astype(np.float64))
    return torch.from_numpy(words.view(np.uint8)), wide.expand(-1, format_.block)


def elements_of(name: str) -> np.ndarray:
    """The value of each code, float64."""
    if name == "hif4":
        magnitudes = np.arange(8) / 4
        return np.concatenate([magnitudes, -magnitudes])
    if name.startswith("int4"):
        return np.array([*range(8), np.nan, *range(-7, 0)], dtype=np.float64)
    bits = FORMATS_OF_BLOCKS[name].bits
    return np.arange(2**bits, dtype=np.uint8).view(ELEMENTS[name]).astype(np.float64)


@each_format
def test_every_code(name: str) -> None:
    """Each element's beside each scale's, and what is finite is packed to codes of the same values."""
    format_ = FORMATS_OF_BLOCKS[name]
    scales, units = codes_of_scales(format_)
    values, count = torch.from_numpy(elements_of(name)), 2**format_.bits
    for first in range(0, count, format_.block):
        codes = (torch.arange(first, first + format_.block) % count).to(torch.uint8).expand(len(scales), -1)
        rows = torch.cat([torch.from_numpy(joined(codes.numpy(), format_.bits)), scales], dim=1)
        decoded = format_.decode(rows)
        product = (values[codes.long()] * units).float().to(torch.bfloat16)
        assert_same(decoded, product)
        assert_same(format_.decode(rows, torch.float32), decoded.float())
        known = decoded.masked_fill(~decoded.isfinite(), 0.0)
        if format_.kind == kernels.SCALE_BF16:
            known = known + 0.0  # whole numbers have one zero
        assert_same_bits(format_.decode(format_.pack(known)), known)


@each_format
def test_what_is_rounded_is_packed_as_it_is(name: str) -> None:
    """Rounding it again would not always give it again: where the largest of a block has become smaller, so may its
    scale."""
    format_, moved = FORMATS_OF_BLOCKS[name], 0
    generator = torch.Generator().manual_seed(1)
    for power in (0, -9, -12, -45, 7):
        x = torch.randn(256, 256, generator=generator) * 2.0**power
        x[0, 3], x[1, 100] = torch.nan, torch.inf
        rounded, _ = format_.scaled_round(x, ONE, "saturate")
        packed = format_.pack(rounded)
        assert packed.dtype == torch.uint8
        assert packed.shape == (256, format_.row_bytes(256))
        assert_same(format_.decode(packed), rounded)
        assert_same(format_.decode(packed.view(16, 16, -1)).view(256, 256), rounded)
        again, _ = format_.scaled_round(rounded, ONE, "saturate")
        moved += int((again != rounded)[rounded.isfinite()].sum())
    assert bool(moved) == (name in ("nvfp4", "hif4") or name.startswith("int4"))


@each_format
def test_values_off_the_grid_are_refused(name: str) -> None:
    format_ = FORMATS_OF_BLOCKS[name]
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    rounded, _ = format_.scaled_round(x, ONE, "saturate")
    format_.pack(rounded)
    rounded[2, 77] *= 1.0625
    for wrong in (x, rounded):
        with pytest.raises(ValueError, match=f"these are no values of {name}"):
            format_.pack(wrong)


@each_format
def test_the_size_of_rows(name: str) -> None:
    format_ = FORMATS_OF_BLOCKS[name]
    for columns in (128, 256, 13824):
        assert format_.row_bytes(columns) * 8 == SIZES[name][0] * columns
        assert format_.columns_of(format_.row_bytes(columns)) == columns
    for refused in (lambda: format_.row_bytes(72), lambda: format_.scaled_round(torch.ones(2, 72), ONE, "saturate")):
        with pytest.raises(ValueError, match=f"rows of 72 elements do not divide into blocks of {format_.block}"):
            refused()
    with pytest.raises(ValueError, match=f"{name} has no infinity, choose saturate"):
        format_.round(torch.ones(2, 128), "inf")


@each_format
def test_overflow_is_counted_and_saturates(name: str) -> None:
    format_, largest = FORMATS_OF_BLOCKS[name], SIZES[name][1]
    x = torch.zeros(3, 256)
    x[0, 7] = format_.overflow
    x[1, 9] = torch.tensor(min(format_.overflow, 3e38)).nextafter(ONE * 0)
    x[2, 130] = -2 * format_.overflow
    rounded, over = format_.scaled_round(x, ONE, "saturate")
    assert over == 2
    assert over.dtype == torch.int64
    if math.isfinite(largest):
        assert (rounded[0, 7], rounded[1, 9], rounded[2, 130]) == (largest, largest, -largest)
        assert (rounded != 0).sum() == 3
    else:  # no scale is too large, and an infinity leaves nothing of its block
        assert rounded[0, 7].isnan()
        assert rounded[2, 130].isnan()
        assert rounded[1].isfinite().all()
    assert format_.scaled_round(x, torch.tensor([1.0, 2.0, 4.0]), "saturate")[1] == (1 if math.isfinite(largest) else 2)


@each_format
def test_factors_and_scales_outside_come_first(name: str) -> None:
    """Of rows or of the whole, in float32, whatever the type and the layout in memory of the matrix."""
    format_, generator = FORMATS_OF_BLOCKS[name], torch.Generator().manual_seed(3)
    wide = torch.randn(2 * 33, 2 * 256, generator=generator)
    factors = torch.exp2(torch.randint(-3, 4, (256,), generator=generator).float())
    by_row = torch.rand(33, generator=generator) + 0.1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for x in (wide[:33, :256], wide.T[:256, :33].T, wide[::2, ::2]):
            given = x.to(dtype)
            held = given.float().clone()
            for scale in (by_row, torch.tensor(0.37)):
                scaled = held * factors / (scale[:, None] if scale.ndim else scale)
                expected, _ = format_.scaled_round(scaled, ONE, "saturate")
                assert_same_bits(format_.scaled_round(given, scale, "saturate", factors)[0], expected)
                assert_same_bits(eager.round_blocks(given, scale, *format_.how, factors)[0], expected)
    assert_same_bits(format_.round(wide[0], "saturate"), format_.round(wide, "saturate")[0])
    assert format_.round(wide.half(), "saturate").dtype == torch.float16


@pytest.mark.parametrize("name", ["nvfp4", "hif4"])
def test_threads_share_the_rows(name: str) -> None:
    format_, before = FORMATS_OF_BLOCKS[name], torch.get_num_threads()
    x = torch.randn(601, 1024, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 6, 601)[:, None]
    expected, count = eager.round_blocks(x, ONE, *format_.how)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            rounded, over = format_.scaled_round(x, ONE, "saturate")
            assert_same_bits(rounded, expected)
            assert over == count > 0
    finally:
        torch.set_num_threads(before)
