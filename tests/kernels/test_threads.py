"""The CPU kernels where there is more than one thread, or more than one process."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.inputs import assert_same_bits
from wanquant.formats import hif8
from wanquant.kernels import cpu

LARGE = torch.randn(1 << 20).to(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.kernels.forked"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_from_several_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    inputs = [torch.randn(1 << 19) * 10**k for k in range(6)]
    expected = [hif8.round(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(hif8.round, inputs), expected, strict=True):
                assert_same_bits(got, wanted)


def test_beside_torchs_own_threads() -> None:
    """Rounding in one thread while products run in another: both come out as they do alone."""
    a = torch.randn(400, 400)
    product, rounded = torch.mm(a, a), hif8.round(LARGE)
    with ThreadPoolExecutor(2) as pool:
        products = [pool.submit(torch.mm, a, a) for _ in range(20)]
        roundings = [pool.submit(hif8.round, LARGE) for _ in range(20)]
        assert all(torch.equal(task.result(), product) for task in products)
        assert all(torch.equal(task.result(), rounded) for task in roundings)


def test_an_interrupt_does_not_free_what_is_still_written(threads: Callable[[int], None]) -> None:
    threads(2)
    # A shell starts what it puts into the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended: list[int] = []

    def call(first: int, past: int) -> None:
        if first:  # on the other thread, when the interrupt has come
            time.sleep(0.3)
            ended.append(first)
        else:
            threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()

    try:
        with pytest.raises(KeyboardInterrupt):
            cpu.run_chunks(call, 2, 1 << 20)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [1]


@pytest.mark.slow
def test_neither_slows_the_other(threads: Callable[[int], None]) -> None:
    """Products and roundings by turns take the time of both alone: neither's threads spin in the other's way."""
    threads(2)
    a, out = torch.randn(600, 600), torch.empty_like(LARGE)

    def both() -> None:
        torch.mm(a, a)
        hif8.round(LARGE, out=out)

    calls = (lambda: torch.mm(a, a), lambda: hif8.round(LARGE, out=out), both)
    times: list[list[float]] = [[], [], []]
    for _ in range(60):
        for call, kept in zip(calls, times, strict=True):
            call()
            begun = time.perf_counter()
            for _ in range(5):
                call()
            kept.append(time.perf_counter() - begun)
    product, rounding, together = (statistics.median(kept) for kept in times)
    assert together < 1.3 * (product + rounding)
