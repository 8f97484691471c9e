"""The kernels of the CPU, one function per op: numba loops on chunks, on threads of our own.

The loops are serial and release the GIL; chunks of large tensors run on a small pool of Python
threads. numba's own parallel loops are avoided on purpose: on OpenMP they bring a second runtime
beside torch's and kill forked children, on the work queue they are not thread-safe.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from wanquant.kernels import eager
from wanquant.kernels.blocks import SCALE_BYTES
from wanquant.kernels.eager import counted, fit, quantize_rows_coded
from wanquant.kernels.loops import DESCALE, LOOPS, carry, stochastic
from wanquant.kernels.loops_blocks import BLOCK_LOOPS, split_loop
from wanquant.kernels.tables import carry_table, decode_table, narrow

__all__ = ["quantize_rows_coded"]

#: Elements below which one thread is quicker than waking another.
_CHUNK = 1 << 17
_pool: ThreadPoolExecutor | None = None


def round_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    source = fit(x)
    out = torch.empty_like(source)
    _run(LOOPS[source.dtype].round, x.numel(), x.numel(), source, out, saturate)
    return out if out.dtype == x.dtype else narrow(out, x.dtype)


def round_hif8_out(x: torch.Tensor, saturate: bool, out: torch.Tensor) -> None:
    source = fit(x)
    if out.is_contiguous() and out.dtype == source.dtype:
        _run(LOOPS[source.dtype].round, x.numel(), x.numel(), source, out, saturate)
    else:
        out.copy_(round_hif8(source, saturate))


def round_hif8_stochastic(x: torch.Tensor, noise: torch.Tensor, saturate: bool) -> torch.Tensor:
    values = x.float().contiguous()
    out = torch.empty_like(values)
    _run(stochastic, x.numel(), x.numel(), values, noise.contiguous(), out, saturate)
    return narrow(out, x.dtype)


def encode_hif8(x: torch.Tensor, saturate: bool) -> torch.Tensor:
    values = fit(x)
    out = torch.empty(values.shape, dtype=torch.uint8)
    _run(LOOPS[values.dtype].encode, x.numel(), x.numel(), values, out, saturate)
    return out


def decode_hif8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        return narrow(decode_hif8(codes, torch.float32), dtype)
    return look_up(codes, decode_table(dtype))


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    if table.dtype not in LOOPS:
        return eager.look_up(codes, table)
    out = torch.empty(codes.shape, dtype=table.dtype)
    _run(LOOPS[table.dtype].decode, codes.numel(), codes.numel(), codes.contiguous(), out, table)
    return out


def carry_e4m3(values: torch.Tensor, lift: float) -> tuple[torch.Tensor, torch.Tensor]:
    values, rows = values.contiguous(), len(values)
    out, lost = torch.empty(values.shape, dtype=torch.uint8), torch.empty(rows, dtype=torch.int64)
    columns = values.numel() // max(1, rows)
    _run(carry, rows, values.numel(), values, out, carry_table(lift), lost, columns)
    return out, counted(lost.sum(), values.numel())


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    x = fit(x)
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    _run(LOOPS[x.dtype].absmax_rows, x.shape[0], x.numel(), x, out, x.shape[1])
    return out


def scaled_round_hif8(
    x: torch.Tensor, scale: torch.Tensor, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale, (rows, columns) = fit(x), scale.contiguous(), x.shape
    out, over = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(rows, dtype=torch.int64)
    loop = LOOPS[x.dtype].scaled_round
    _run(loop, rows, x.numel(), x, factors, scale, scale.ndim, out, over, columns, saturate)
    return out, over.sum()


def quantize_rows_hif8(
    x: torch.Tensor, goal: float, power_of_two: bool, saturate: bool, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, (rows, columns) = fit(x), x.shape
    out, scale = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(rows, dtype=torch.float32)
    loop = LOOPS[x.dtype].quantize_rows
    _run(loop, rows, x.numel(), x, factors, out, scale, columns, goal, power_of_two, saturate)
    return out, scale


def round_blocks(
    x: torch.Tensor,
    scale: torch.Tensor,
    block: int,
    kind: int,
    mantissa: int,
    exponent: int,
    largest: float,
    limit: float,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale, (rows, columns) = fit(x), scale.contiguous(), x.shape
    out, over = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(rows, dtype=torch.int64)
    how = (block, kind, *_grid(mantissa, exponent, largest), np.float32(limit))
    loop = BLOCK_LOOPS[x.dtype].round
    _run(loop, rows, x.numel(), x, factors, scale, scale.ndim, out, over, columns, *how)
    return out, over.sum()


def _grid(mantissa: int, exponent: int, largest: float) -> tuple[Any, ...]:
    """Of elements, as the loops take it: exponents as fields of float32, in the types that they are compiled for."""
    shift, least = np.uint32((23 - mantissa) << 23), np.uint32((127 + exponent) << 23)
    return shift, least, np.float32(largest), math.frexp(largest)[1] - 1


def split_blocks(
    values: torch.Tensor, block: int, kind: int, mantissa: int, exponent: int, largest: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, (rows, columns) = values.contiguous(), values.shape
    blocks, size = columns // block, SCALE_BYTES[kind]
    codes, scales = (torch.empty(rows, width, dtype=torch.uint8) for width in (columns, blocks * size))
    held = torch.empty(rows, blocks, dtype=torch.bool)
    how = (block, kind, *_grid(mantissa, exponent, largest))
    place = (
        np.uint32(23 - mantissa),
        np.uint32((126 + exponent) << mantissa),
        np.float32(2.0 ** (mantissa - exponent)),
    )
    _run(split_loop, rows, values.numel(), values, codes, scales, held, columns, *how, *place, bits, size)
    return codes, scales, held


def descale(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype == torch.float16:
        return descale(product, row_scale, column_scale, bias, torch.float32).to(dtype)
    product = product.float() if product.dtype == torch.int32 else product
    product, row_scale, (rows, columns) = fit(product), row_scale.contiguous(), product.shape
    column_scale = (column_scale if column_scale.ndim else column_scale.expand(columns)).contiguous()
    bias = None if bias is None else fit(bias)
    out = torch.empty_like(product, dtype=dtype)
    loop = DESCALE[product.dtype, product.dtype if bias is None else bias.dtype, dtype]
    _run(loop, rows, product.numel(), product, row_scale, row_scale.ndim, column_scale, bias, out, columns)
    return out


def _run(loop: Callable[..., Any], count: int, elements: int, *args: Any) -> None:
    """The loop over ``range(count)``, in parts; tensors among its arguments are given as addresses."""
    given = [_address(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    run_chunks(lambda first, past: loop(first, past, *given), count, elements)


def _address(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


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
