"""Run by ``test_ops`` under TRITON_INTERPRET=1: every Triton kernel against the eager one, bit for bit.

With ``all`` as its argument in all combinations of inputs and options; else each of them in some.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from tests.kernels.inputs import ALL16, MATRICES, WIDE, assert_same_bits
from wanquant.formats.blocks import BlockFormat
from wanquant.formats.registry import FORMATS
from wanquant.kernels import blocks, cuda, eager


def some(matrix: torch.Tensor, apart: int) -> torch.Tensor:
    """Rows of every magnitude, and those with zeros, NaN and an infinity: each row is a program of its own, slow
    here."""
    return matrix[[*range(3, 7), *range(8, len(matrix), apart)]]


def rows_of(matrices: Sequence[torch.Tensor], other: bool, everything: bool) -> Iterator[torch.Tensor]:
    """Each matrix in both types, or in one of them and, asked for the ``other``, in that."""
    for number, matrix in enumerate(matrices):
        for dtype, narrow in ((torch.float32, 0), (torch.bfloat16, 1)):
            if everything or (number + other) % 2 == narrow:
                yield some(matrix, 7 if everything else 12).to(dtype)


def check_blocks(everything: bool) -> None:
    """Enough for more than one program, the last of them not full."""
    ties = torch.arange(-1152, 1152).view(9, 256) / 16
    for number, format_ in enumerate(each for each in FORMATS.values() if isinstance(each, BlockFormat)):
        for x in [*rows_of([matrix[:, :256] for matrix in MATRICES], number % 2 == 1, everything), ties]:
            powers = torch.ldexp(torch.ones(256), torch.arange(256) % 7 - 3)
            scales = (torch.tensor(0.37), torch.rand(len(x)) + 0.01)
            hows = ((scales[0], powers), (scales[1], None))
            for scale, factors in hows if everything else hows[number % 2 :][:1]:
                ours = cuda.round_blocks(x, scale, *format_.how, factors)
                for got, expected in zip(ours, blocks.round_blocks(x, scale, *format_.how, factors), strict=True):
                    assert_same_bits(got, expected)


def main(everything: bool) -> None:
    check_blocks(everything)
    for saturate in (False, True):
        for x in (WIDE[:4], ALL16.view(torch.bfloat16), ALL16.view(torch.float16), WIDE[:0], WIDE[:4].T):
            assert_same_bits(cuda.round_hif8(x, saturate), eager.round_hif8(x, saturate))
            assert_same_bits(cuda.encode_hif8(x, saturate), eager.encode_hif8(x, saturate))
            out = torch.empty_like(x)
            cuda.round_hif8_out(x, saturate, out)
            assert_same_bits(out, eager.round_hif8(x, saturate))
        for x in rows_of(MATRICES, saturate, everything):
            powers = torch.ldexp(torch.ones(x.shape[1]), torch.arange(x.shape[1]) % 7 - 3)
            # Each choice with each of the others', but not all three: of every second combination.
            for power_of_two, factors in ((saturate, None), (not saturate, powers)):
                pairs = zip(
                    cuda.quantize_rows_hif8(x, 15.0, power_of_two, saturate, factors),
                    eager.quantize_rows_hif8(x, 15.0, power_of_two, saturate, factors),
                    strict=True,
                )
                for got, expected in pairs:
                    assert_same_bits(got, expected)
            scales = (torch.tensor(0.37), torch.rand(len(x)) + 0.01)
            for scale, factors in ((scales[saturate], None), (scales[not saturate], powers)):
                got, over = cuda.scaled_round_hif8(x, scale, saturate, factors)
                expected, expected_over = eager.scaled_round_hif8(x, scale, saturate, factors)
                assert_same_bits(got, expected)
                assert over == expected_over
        for x in rows_of(MATRICES, saturate, everything):
            powers = torch.ldexp(torch.ones(x.shape[1]), torch.arange(x.shape[1]) % 7 - 3)
            for kind, goal, lift in ((0, 15.0, 16.0), (1, 448.0, 1.0), (2, 127.0, 1.0)):
                factors = powers if saturate else None
                coded = cuda.quantize_rows_coded(x, kind, goal, saturate, lift, 4 * lift, factors)
                for got, expected in zip(
                    coded, eager.quantize_rows_coded(x, kind, goal, saturate, lift, 4 * lift, factors), strict=True
                ):
                    assert_same_bits(got, expected)
        rounded = eager.round_hif8(WIDE[:4].to(torch.bfloat16), saturate)
        for got, expected in zip(cuda.carry_e4m3(rounded, 16.0), eager.carry_e4m3(rounded, 16.0), strict=True):
            assert_same_bits(got, expected)
        whole = torch.randint(-(2**26), 2**26, (5, 67), dtype=torch.int32)
        columns = torch.rand(67)
        for dtype in (torch.float32, torch.bfloat16):
            assert_same_bits(
                cuda.descale(whole, columns[:5], columns, columns, dtype),
                eager.descale(whole, columns[:5], columns, columns, dtype),
            )
        for product in (torch.randn(5, 67).to(dtype) for dtype in (torch.float32, torch.bfloat16)):
            product[1, 3] = torch.nan
            rows, columns, bias = torch.rand(5), torch.rand(67), torch.randn(67).to(product.dtype)
            one = torch.tensor(0.37)
            for how in ((rows, columns, bias), (one, columns, None), (rows, one, bias)):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    assert_same_bits(cuda.descale(product, *how, dtype), eager.descale(product, *how, dtype))
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = eager.decode_hif8(codes, torch.float32)
    every = values[values.isfinite() & (values.abs() <= 15)][None]  # the ties of E4M3 among them
    wide = torch.randn(2, 16500, generator=torch.Generator().manual_seed(0))  # more columns than a program holds
    for x in (every, wide):
        ours = cuda.quantize_rows_coded(x, 0, 15.0, False, 16.0, 32.0)
        for got, expected in zip(ours, eager.quantize_rows_coded(x, 0, 15.0, False, 16.0, 32.0), strict=True):
            assert_same_bits(got, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_same_bits(cuda.decode_hif8(codes, dtype), eager.decode_hif8(codes, dtype))
    assert_same_bits(cuda.look_up(codes, codes.flip(0)), codes.flip(0))
    print("all equal")


if __name__ == "__main__":
    main("all" in sys.argv)
