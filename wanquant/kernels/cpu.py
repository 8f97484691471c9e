"""The kernels of the CPU, one function per op: numba loops on chunks, on threads of our own.

The loops are serial and release the GIL; chunks of large tensors run on a small pool of Python
threads. numba's own parallel loops are avoided on purpose: on OpenMP they bring a second runtime
beside torch's and kill forked children, on the work queue they are not thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from types import SimpleNamespace

import torch

from wanquant.kernels.eager import fit
from wanquant.kernels.loops import DESCALE, FACTORED, LOOPS, stochastic
from wanquant.kernels.tables import decode_table, narrow

#: Elements below which one thread is quicker than waking another.
_CHUNK = 1 << 17
_pool: ThreadPoolExecutor | None = None


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty_like(source)
    _round_into(source, out, saturate)
    return out if out.dtype == x.dtype else narrow(out, x.dtype)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    source = fit(x)
    if out.is_contiguous() and out.dtype == source.dtype:
        _round_into(source, out, saturate)
    else:
        out.copy_(round_hif8(source, saturate))


def _round_into(x: torch.Tensor, out: torch.Tensor, saturate: bool) -> None:
    loop, source, target, size = LOOPS[x.dtype].round, x.data_ptr(), out.data_ptr(), x.element_size()
    run_chunks(lambda a, b: loop(source + a * size, target + a * size, b - a, saturate), x.numel(), x.numel())


def round_hif8_stochastic(x: torch.Tensor, noise: torch.Tensor, saturate: bool) -> torch.Tensor:
    values, bits = x.float().contiguous(), noise.contiguous()
    out = torch.empty_like(values)
    source, random, target = values.data_ptr(), bits.data_ptr(), out.data_ptr()

    def call(a: int, b: int) -> None:
        stochastic(source + 4 * a, random + 4 * a, target + 4 * a, b - a, saturate)

    run_chunks(call, x.numel(), x.numel())
    return out if x.dtype == torch.float32 else narrow(out, x.dtype)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    values = fit(x)
    out = torch.empty(values.shape, dtype=torch.uint8)
    loop, source, target, size = LOOPS[values.dtype].encode, values.data_ptr(), out.data_ptr(), values.element_size()
    run_chunks(lambda a, b: loop(source + a * size, target + a, b - a, saturate), x.numel(), x.numel())
    return out


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        return narrow(decode_hif8(codes, torch.float32), dtype)
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    loop, source, target, size = LOOPS[dtype].decode, codes.data_ptr(), out.data_ptr(), out.element_size()
    table = decode_table(dtype).data_ptr()
    run_chunks(lambda a, b: loop(source + a, target + a * size, b - a, table), codes.numel(), codes.numel())
    return out


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    x = fit(x)
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    loop, source, target, columns = LOOPS[x.dtype].absmax_rows, x.data_ptr(), out.data_ptr(), x.shape[1]
    pitch = columns * x.element_size()
    run_chunks(lambda a, b: loop(source + a * pitch, target + 4 * a, b - a, columns), x.shape[0], x.numel())
    return out


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale, (loops, by_column) = fit(x), scale.contiguous(), _loops(x, factors)
    out, over = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(x.shape[0], dtype=torch.int64)
    loop, source, target, columns = loops.scaled_round, x.data_ptr(), out.data_ptr(), x.shape[1]
    pitch, scales, counts, stride = columns * x.element_size(), scale.data_ptr(), over.data_ptr(), scale.ndim

    def call(a: int, b: int) -> None:
        part = (source + a * pitch, scales + 4 * a * stride, stride, target + 2 * a * columns, counts + 8 * a)
        loop(*part, b - a, columns, saturate, by_column)

    run_chunks(call, x.shape[0], x.numel())
    return out, over.sum()


def _loops(x: torch.Tensor, factors: torch.Tensor | None) -> tuple[SimpleNamespace, int]:
    """The loops over rows of that type, with or without factors, and the address of the factors."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    if factors is None:
        return LOOPS[dtype], 0
    assert factors.is_contiguous()
    return FACTORED[dtype], factors.data_ptr()


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, (loops, by_column) = fit(x), _loops(x, factors)
    out, scale = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(x.shape[0], dtype=torch.float32)
    loop, source, target, columns = loops.quantize_rows, x.data_ptr(), out.data_ptr(), x.shape[1]
    pitch, scales = columns * x.element_size(), scale.data_ptr()

    def call(a: int, b: int) -> None:
        part = (source + a * pitch, target + 2 * a * columns, scales + 4 * a)
        loop(*part, b - a, columns, goal, power_of_two, saturate, by_column)

    run_chunks(call, x.shape[0], x.numel())
    return out, scale


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype == torch.float16:
        return descale(product, row_scale, column_scale, bias, torch.float32).to(dtype)
    product, row_scale = fit(product), row_scale.contiguous()
    rows, columns = product.shape
    column_scale = (column_scale if column_scale.ndim else column_scale.expand(columns)).contiguous()
    if bias is not None:
        bias = fit(bias)
    out = torch.empty_like(product, dtype=dtype)
    loop = DESCALE[product.dtype, product.dtype if bias is None else bias.dtype, dtype]
    source, target, offset = product.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()
    pitch, out_pitch = columns * product.element_size(), columns * out.element_size()
    by_row, row_stride, by_column = row_scale.data_ptr(), row_scale.ndim, column_scale.data_ptr()

    def call(a: int, b: int) -> None:
        scales = (by_row + 4 * a * row_stride, row_stride, by_column)
        loop(source + a * pitch, *scales, offset, bias is not None, target + a * out_pitch, b - a, columns)

    run_chunks(call, rows, product.numel())
    return out


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def threads_for(count: int, elements: int, chunk: int = _CHUNK) -> int:
    """How many threads ``run_chunks`` would take, 1 at least."""
    return max(1, min(torch.get_num_threads(), elements // chunk, count))


def run_chunks(call: Callable[[int, int], None], count: int, elements: int, chunk: int = _CHUNK) -> None:
    """Calls ``call(first, past)`` for parts of ``range(count)`` that hold ``elements`` in all, on torch's number
    of threads, each with at least ``chunk`` of the elements."""
    threads = threads_for(count, elements, chunk)
    if threads == 1:
        call(0, count)
        return
    global _pool
    if _pool is None or _pool._max_workers < threads - 1:
        _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="hif8")
    edges = [count * edge // threads for edge in range(threads + 1)]
    tasks: list[Future[None]] = []
    try:
        for part in list(pairwise(edges))[1:]:
            tasks.append(_pool.submit(call, *part))
        call(edges[0], edges[1])
    finally:
        _outwait(tasks)
    for task in tasks:
        task.result()


def _outwait(tasks: list[Future[None]]) -> None:
    """Waits for the tasks whatever comes between, and raises that afterwards: they hold addresses of tensors, which
    must not be freed before."""
    interrupt: BaseException | None = None
    while any(not task.done() for task in tasks):
        try:
            wait(tasks)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
