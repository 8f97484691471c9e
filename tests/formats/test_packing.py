"""Codes and scales of values in block formats: by the CPU's loops as by plain torch, and back without loss."""

from __future__ import annotations

import pytest
import torch

from wanquant import kernels
from wanquant.formats.blocks import BlockFormat
from wanquant.formats.registry import FORMATS
from wanquant.kernels import blocks as plain

NAMES = [name for name, format_ in FORMATS.items() if format_.block]


def values_of(name: str) -> tuple[BlockFormat, torch.Tensor]:
    """On the grid: of every size, zeros of both signs, and blocks that are broken."""
    format_ = FORMATS[name]
    assert isinstance(format_, BlockFormat)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(48, 256, generator=generator)
    x = torch.randn(48, 256, generator=generator) * torch.exp(2 * spread)
    x *= torch.exp2(torch.linspace(-120, 100, 48))[:, None]
    x[0], x[1], x[2, 3], x[3, 200], x[4, ::2] = 0.0, -0.0, torch.nan, -torch.inf, -0.0
    return format_, format_.round(x.to(torch.bfloat16), "saturate")


@pytest.mark.parametrize("name", NAMES)
def test_the_cpus_loop_is_plain_torch(name: str) -> None:
    format_, values = values_of(name)
    found = kernels.split_blocks(values, format_.how, format_.bits)
    wanted = plain.split_blocks(values, *format_.how[:-1], format_.bits)
    held = wanted[2].repeat_interleave(format_.block, 1)
    assert torch.equal(found[2], wanted[2])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0][held], wanted[0][held])
    assert held.float().mean() > 0.9  # the other scales are searched for


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(name: str) -> None:
    format_, values = values_of(name)
    packed = format_.pack(values)
    assert packed.shape == (48, format_.row_bytes(256))
    again = format_.decode(packed)
    broken = values.isnan()
    assert broken.any()
    assert torch.equal(again.isnan(), broken)
    assert torch.equal(again[~broken].view(torch.int16), values[~broken].view(torch.int16))
    assert torch.equal(format_.pack(values.float()), packed)
    assert torch.equal(format_.decode(packed, torch.float32)[~broken], values[~broken].float())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_on_no_grid_is_refused(name: str) -> None:
    format_ = FORMATS[name]
    odd = torch.linspace(1, 2, 256).to(torch.bfloat16)[None]
    with pytest.raises(ValueError, match=f"these are no values of {name}"):
        format_.pack(odd)
    near = format_.round(torch.randn(1, 256), "saturate")
    near[0, 7] = 1.0 + 2.0**-20
    with pytest.raises(ValueError, match=f"these are no values of {name}"):
        format_.pack(near)


def test_bytes_are_in_the_order_that_is_told() -> None:
    """The first element in the lowest bits, behind the elements the scales of blocks."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[0, 16] = 6.0, -1.5, 12.0
    packed = FORMATS["nvfp4"].pack(x)[0].tolist()
    assert packed[:2] == [7 | (8 | 3) << 4, 0]
    assert packed[8] == 7
    assert packed[16:] == [0x38, 0x40]  # 1 and 2 in E4M3
    six = torch.zeros(1, 32, dtype=torch.bfloat16)
    six[0, 1], six[0, 2] = 28.0, -28.0
    packed = FORMATS["mxfp6"].pack(six)[0].tolist()
    assert int.from_bytes(bytes(packed[:3]), "little") == 31 << 6 | 63 << 12
    assert packed[24:] == [127]
