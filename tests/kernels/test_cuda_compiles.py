"""Every Triton kernel compiles to machine code for real cards, without one: what its interpreter lets pass may not.

The launchers of ``wanquant.kernels.cuda`` are run on small tensors of the CPU with all their options. In the place of a
launch, the kernel and its arguments are noted, and compiled for each card in just that specialization.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from wanquant.kernels import cuda  # noqa: E402

#: Compute capabilities: A100, H100 and H200, B200.
CARDS = (80, 90, 100)
#: Names of pointers in a signature.
TYPES = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.float32: "*fp32"}
#: Columns of matrices, elements of tensors: those that 16 divides are compiled otherwise, and so is a single one.
SIZES = (48, 47, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {name: each for name, each in vars(cuda).items() if isinstance(each, JITFunction)}
#: Not launched but called by others.
INNER = {"_round_bits", "_widen", "_scale_of", "_factored"}

Launch = tuple[str, tuple[Any, ...]]


def described(value: Any) -> Any:
    """What of an argument its specialization depends on: as Triton's launcher has it, but for pointers, which torch
    allocates at multiples of 16 bytes."""
    if isinstance(value, torch.Tensor):
        return (TYPES[value.dtype], True)
    if isinstance(value, int):
        return ("constexpr", value) if value == 1 else ("i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0)
    assert isinstance(value, float)
    return ("fp32", False)


def launches(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[None]:
    """Calls every launcher with every combination of its options."""
    for size, dtype, saturate in itertools.product(sizes, dtypes, (False, True)):
        x = torch.zeros(size, dtype=dtype)
        cuda.round_hif8(x, saturate)
        cuda.round_hif8_out(x, saturate, torch.empty_like(x))
        cuda.encode_hif8(x, saturate)
        cuda.decode_hif8(torch.zeros(size, dtype=torch.uint8), dtype)
        matrix = torch.zeros(3, size, dtype=dtype)
        for factors in (None, torch.ones(size)):
            for power_of_two in (False, True):
                cuda.quantize_rows_hif8(matrix, 15.0, power_of_two, saturate, factors)
            for scale in (torch.ones(()), torch.ones(3)):
                cuda.scaled_round_hif8(matrix, scale, saturate, factors)
        yield


def launched(sizes: Sequence[int] = SIZES, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Launch]:
    found: set[Launch] = set()

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **_: Any) -> None:
        given = zip(self.params, args, strict=True)
        found.add((self.__name__, tuple(each if to.is_constexpr else described(each) for to, each in given)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        for _ in launches(sizes, dtypes):
            pass
    return sorted(found, key=repr)


def source_of(launch: Launch) -> ASTSource:
    name, arguments = launch
    function = KERNELS[name]
    signature, constants, attributes = {}, {}, {}
    for place, (parameter, given) in enumerate(zip(function.params, arguments, strict=True)):
        kind, detail = ("constexpr", given) if parameter.is_constexpr else given
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = detail
        elif detail:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def test_every_kernel_is_launched() -> None:
    assert {name for name, _ in launched()} == set(KERNELS) - INNER


def compile_all(found: Sequence[Launch], card: int) -> None:
    target = GPUTarget("cuda", card, 32)
    for launch in found:
        assert triton.compile(source_of(launch), target=target).asm["cubin"][:4] == b"\x7fELF", launch


@pytest.mark.parametrize("card", CARDS)
def test_every_specialization_compiles(card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one of the cards, and every kernel for each of them. The length changes how memory is read and the type what
    is computed: both in all ways, but not in all pairs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = [*launched(SIZES[:1]), *launched(SIZES[1:], DTYPES[1:2])]
    for name in set(KERNELS) - INNER:
        of_it = [launch for launch in found if launch[0] == name]
        compile_all(of_it[CARDS.index(card) :: len(CARDS)] or of_it[:1], card)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_one_compiles_for_each_card(card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_all(launched(), card)
