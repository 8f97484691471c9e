"""The CPU kernels: numba loops over bit patterns, on chunks, on threads of our own.

The loops are serial and release the GIL; chunks of large tensors run on a small pool of Python
threads. numba's own parallel loops are avoided on purpose: on OpenMP they bring a second runtime
beside torch's and kill forked children, on the work queue they are not thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numba
import numpy as np
import torch

from wanquant.kernels.eager import narrow
from wanquant.kernels.tables import decode_table, encode_table

#: Elements below which one thread is quicker than waking another.
_CHUNK = 1 << 16
_TABLES: dict[torch.dtype, np.ndarray] = {}
_pool: ThreadPoolExecutor | None = None

_njit = partial(numba.njit, nogil=True, cache=True, boundscheck=False, error_model="numpy")


@_njit(inline="always")
def _round_bits32(bits, over):
    """HiF8 rounding of one float32 pattern (uint32); ``over`` is the pattern of an overflow."""
    magnitude = bits & np.uint32(0x7FFFFFFF)
    biased = magnitude >> np.uint32(23)
    distance = biased - np.uint32(127) if biased > np.uint32(127) else np.uint32(127) - biased
    half = np.uint32(1 << 19)
    if distance > np.uint32(3):
        half = np.uint32(1 << 20)
    if distance > np.uint32(7):
        half = np.uint32(1 << 21)
    if distance > np.uint32(15):
        half = np.uint32(1 << 22)
    rounded = (magnitude + half) & ~(np.uint32(2) * half - np.uint32(1))
    rounded = max(rounded, np.uint32(105 << 23))
    if magnitude < np.uint32(104 << 23):
        rounded = np.uint32(0)
    if rounded > np.uint32(142 << 23):
        rounded = over
    if magnitude == np.uint32(0x7F800000):
        rounded = np.uint32(0x7F800000)
    sign = bits & np.uint32(0x80000000)
    if rounded == np.uint32(0):
        sign = np.uint32(0)
    rounded = rounded | sign
    if magnitude > np.uint32(0x7F800000):
        rounded = np.uint32(0x7FC00000)
    return rounded


@_njit()
def _round32(source, target, over):
    for i in range(source.size):
        target[i] = _round_bits32(source[i], over)


@_njit()
def _round16(source, target, over):
    for i in range(source.size):
        target[i] = np.uint16(_round_bits32(np.uint32(source[i]) << np.uint32(16), over) >> np.uint32(16))


@_njit()
def _encode32(source, target, over, table):
    for i in range(source.size):
        target[i] = table[_round_bits32(source[i], over) >> np.uint32(20)]


@_njit()
def _encode16(source, target, over, table):
    for i in range(source.size):
        target[i] = table[_round_bits32(np.uint32(source[i]) << np.uint32(16), over) >> np.uint32(20)]


@_njit()
def _decode(source, target, table):
    for i in range(source.size):
        target[i] = table[source[i]]


@_njit()
def _absmax16(source, target):
    for row in range(source.shape[0]):
        best = np.uint16(0)
        for column in range(source.shape[1]):
            best = max(best, source[row, column] & np.uint16(0x7FFF))
        target[row] = np.uint32(best) << np.uint32(16)


@_njit()
def _absmax32(source, target):
    for row in range(source.shape[0]):
        best = np.uint32(0)
        for column in range(source.shape[1]):
            best = max(best, source[row, column] & np.uint32(0x7FFFFFFF))
        target[row] = best


@_njit()
def _scaled16(source, target, scale, over):
    """BF16 patterns in and out. ``scale`` holds one value a row."""
    for row in range(source.shape[0]):
        step = scale[row]
        wide = np.empty(source.shape[1], np.uint32)
        for column in range(source.shape[1]):
            wide[column] = np.uint32(source[row, column]) << np.uint32(16)
        values = wide.view(np.float32)
        for column in range(source.shape[1]):
            values[column] = values[column] / step
        for column in range(source.shape[1]):
            target[row, column] = np.uint16(_round_bits32(wide[column], over) >> np.uint32(16))


@_njit()
def _scaled32(source, target, scale, over):
    """float32 values in, BF16 patterns out. ``scale`` holds one value a row."""
    for row in range(source.shape[0]):
        step = scale[row]
        values = source[row] / step
        wide = values.view(np.uint32)
        for column in range(source.shape[1]):
            target[row, column] = np.uint16(_round_bits32(wide[column], over) >> np.uint32(16))


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def _run(
    kernel: Callable[..., None], source: np.ndarray, target: np.ndarray, *rest: object, rows: np.ndarray | None = None
) -> None:
    """Runs the kernel over chunks of the first axis, on as many threads as torch uses.

    ``rows``, where given, is an array sliced with the chunks and passed behind the target.
    """
    threads = min(torch.get_num_threads(), source.size // _CHUNK, source.shape[0])
    middle: tuple[np.ndarray, ...] = () if rows is None else (rows,)
    if threads <= 1:
        kernel(source, target, *middle, *rest)
        return
    global _pool
    if _pool is None or _pool._max_workers < threads - 1:
        _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="hif8")
    edges = np.linspace(0, source.shape[0], threads + 1).astype(np.int64)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    tasks = [_pool.submit(kernel, source[part], target[part], *(m[part] for m in middle), *rest) for part in parts[1:]]
    kernel(source[parts[0]], target[parts[0]], *(m[parts[0]] for m in middle), *rest)
    for task in tasks:
        task.result()


def _bits(x: torch.Tensor) -> np.ndarray:
    """The bit patterns of a contiguous tensor as unsigned integers, without a copy."""
    if x.element_size() == 2:
        return x.detach().view(torch.int16).numpy().view(np.uint16)
    return x.detach().view(torch.int32).numpy().view(np.uint32)


def _over(saturate: bool) -> np.uint32:
    return np.uint32((142 << 23) if saturate else 0x7F800000)


def round_any(x: torch.Tensor, out: torch.Tensor, saturate: bool) -> None:
    """Both contiguous, one dimension, BF16 or float32."""
    kernel = _round16 if x.dtype == torch.bfloat16 else _round32
    _run(kernel, _bits(x), _bits(out), _over(saturate))


def encode(x: torch.Tensor, out: torch.Tensor, saturate: bool) -> None:
    kernel = _encode16 if x.dtype == torch.bfloat16 else _encode32
    _run(kernel, _bits(x), out.numpy(), _over(saturate), encode_table().numpy())


def decode(codes: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype not in _TABLES:
        _TABLES[out.dtype] = _bits(narrow(decode_table(), out.dtype))
    _run(_decode, codes.detach().numpy(), _bits(out), _TABLES[out.dtype])


def absmax_rows(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], dtype=torch.float32)
    kernel = _absmax16 if x.dtype == torch.bfloat16 else _absmax32
    _run(kernel, _bits(x), _bits(out))
    return out


def scaled_round(x: torch.Tensor, scale: torch.Tensor, saturate: bool) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    per_row = scale.expand(x.shape[0]).contiguous().numpy()
    if x.dtype == torch.bfloat16:
        _run(_scaled16, _bits(x), _bits(out), _over(saturate), rows=per_row)
    else:
        _run(_scaled32, x.detach().numpy(), _bits(out), _over(saturate), rows=per_row)
    return out
