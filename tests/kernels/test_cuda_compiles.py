"""Every Triton kernel compiles to machine code for real cards, without one: what its interpreter lets pass may not.

The launchers of ``wanquant.kernels.cuda`` are run on small tensors of the CPU with all their options. In the place of a
launch, the kernel and its arguments are noted, and compiled for each card in just that specialization.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from wanquant.formats.blocks import BlockFormat  # noqa: E402
from wanquant.formats.registry import FORMATS  # noqa: E402
from wanquant.kernels import cuda, cuda_bits, cuda_blocks, cuda_rows, eager  # noqa: E402

#: What ``quantize_rows_coded`` writes.
KINDS = (eager.CODED_HIF8, eager.CODED_E4M3, eager.CODED_INT8)
#: Compute capabilities: A100, H100 and H200, B200.
CARDS = (80, 90, 100)
#: Names of pointers in a signature.
WHOLE = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
TYPES = {**WHOLE, torch.float32: "*fp32", torch.bfloat16: "*bf16"}
#: A format with each kind of scale.
BLOCKED = list({format_.kind: format_ for format_ in FORMATS.values() if isinstance(format_, BlockFormat)}.values())
#: Columns of matrices, elements of tensors: those that 16 divides are compiled otherwise, and so is a single one.
SIZES = (48, 47, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {
    name: each
    for module in (cuda, cuda_blocks, cuda_rows)
    for name, each in vars(module).items()
    if isinstance(each, JITFunction)
}
#: Not launched but called by others.
INNER = {
    "_placed",
    "_values",
    "_magnitude",
    "_to_grid",
    "_through_bfloat16",
    "_block_scale",
    "_by_scale",
    "_by_levels",
    *(name for name, each in vars(cuda_bits).items() if isinstance(each, JITFunction)),
}
#: Columns of a row that is held in registers as a whole, as wide as they come, and of one that is not.
WIDE = (1 << 14, (1 << 14) + 16)

#: A kernel's name, its arguments, and how it is compiled.
Launch = tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]


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
        cuda.carry_e4m3(torch.zeros(size, dtype=torch.bfloat16), 16.0)
        matrix = torch.zeros(3, size, dtype=dtype)
        for factors in (None, torch.ones(size)):
            for power_of_two in (False, True):
                cuda.quantize_rows_hif8(matrix, 15.0, power_of_two, saturate, factors)
                for kind in KINDS:
                    cuda.quantize_rows_coded(matrix, kind, 15.0, power_of_two, 16.0, 256.0, factors)
            for scale in (torch.ones(()), torch.ones(3)):
                cuda.scaled_round_hif8(matrix, scale, saturate, factors)
        for format_, scale in itertools.product(BLOCKED, (torch.ones(()), torch.ones(3))):
            blocked = torch.zeros(3, format_.block * size, dtype=dtype)
            cuda.round_blocks(blocked, scale, *format_.how, blocked[0].float() if saturate else None)
        if dtype != torch.float16:  # no product comes in it
            for scale, bias in itertools.product((torch.ones(()), None), (None, torch.zeros(size, dtype=dtype))):
                scales = (torch.ones(3), torch.ones(size)) if scale is None else (scale, scale)
                cuda.descale(matrix, *scales, bias, torch.float32 if saturate else torch.bfloat16)
                if dtype == torch.float32:  # of whole numbers
                    cuda.descale(matrix.to(torch.int32), *scales, bias, torch.bfloat16)
        yield


def wide_launches() -> Iterator[None]:
    for columns in WIDE:
        matrix = torch.zeros(2, columns, dtype=torch.bfloat16)
        cuda.quantize_rows_hif8(matrix, 15.0, False, False)
        for kind in KINDS:
            cuda.quantize_rows_coded(matrix, kind, 15.0, False, 16.0, 256.0)
        yield


def launched(every: Iterable[None]) -> list[Launch]:
    found: set[Launch] = set()

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **how: Any) -> None:
        given = zip(self.params, args, strict=True)
        described_ = tuple(each if to.is_constexpr else described(each) for to, each in given)
        found.add((self.__name__, described_, tuple(sorted(how.items()))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        for _ in every:
            pass
    return sorted(found, key=repr)


def all_launched() -> list[Launch]:
    return [*launched(launches(SIZES, DTYPES)), *launched(wide_launches())]


def runs_on(launch: Launch, card: int) -> bool:
    """E4M3 is of compute capability 8.9 on."""
    name, arguments, _ = launch
    given = {parameter.name: each for parameter, each in zip(KERNELS[name].params, arguments, strict=True)}
    coded = given.get("kind")
    return card >= 89 or not (name == "_carry_kernel" or coded in (eager.CODED_HIF8, eager.CODED_E4M3))


def source_of(launch: Launch) -> ASTSource:
    name, arguments, _ = launch
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
    assert {name for name, *_ in all_launched()} == set(KERNELS) - INNER


def compile_all(found: Sequence[Launch], card: int) -> None:
    """And nothing that belongs into registers goes through memory, by what NVIDIA's assembler prints."""
    target, printed = GPUTarget("cuda", card, 32), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        for launch in found:
            assert triton.compile(source_of(launch), target=target, options=dict(launch[2])).asm["cubin"]
    spills = re.findall(r"(\d+) bytes spill stores", printed.getvalue())
    assert spills
    assert set(spills) == {"0"}, [launch for launch, spill in zip(found, spills, strict=True) if spill != "0"]


@pytest.mark.parametrize("card", [pytest.param(card, marks=[pytest.mark.slow] * (card != 90)) for card in CARDS])
def test_every_specialization_compiles(card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one of the cards, and every kernel for each of them. The length changes how memory is read and the type what
    is computed: both in all ways, but not in all pairs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = [*launched(launches(SIZES[:1], DTYPES)), *launched(launches(SIZES[1:], DTYPES[1:2]))]
    for name in set(KERNELS) - INNER:
        of_it = [launch for launch in found if launch[0] == name and runs_on(launch, card)]
        if of_it:  # not E4M3's, on the oldest of them
            compile_all(of_it[CARDS.index(card) :: len(CARDS)] or of_it[:1], card)
    if card == 90:
        compile_all(launched(wide_launches()), card)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_one_compiles_for_each_card(card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_all([launch for launch in all_launched() if runs_on(launch, card)], card)
