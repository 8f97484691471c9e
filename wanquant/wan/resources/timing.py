"""How long one call takes, and whether something else used the machine meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from wanquant.wan.products import quick_products
from wanquant.wan.resources.footprint import once

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds that a probe takes at least, once it is warm.
LONG_ENOUGH = 0.2
#: Median of a probe's repetitions over the quickest, above which something else is using the machine; and time the
#: process had a CPU, as a share of the time that passed, below which it does.
UNSTEADY, SHARE = 1.3, 0.9

#: Of the probes that a plan has used: whether something else used the machine meanwhile.
_disturbed: list[bool] = []


def probed(function: Callable[P, R]) -> Callable[P, R]:
    """Kept for the process, with whether it was disturbed: the jobs of a sweep ask for the same."""

    @once
    def probe(*given: P.args, **named: P.kwargs) -> tuple[R, bool]:
        before = len(_disturbed)
        found = function(*given, **named)
        return found, any(_disturbed[before:])

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        found, disturbed = probe(*given, **named)
        _disturbed.append(disturbed)
        return found

    return call


def begin() -> None:
    """Of a plan: what other plans have used does not count."""
    _disturbed.clear()


def is_busy() -> bool:
    """Whether others use the machine, so that what was probed since ``begin`` is a guess: more threads want to run than
    this process has, or a probe was disturbed."""
    crowded = hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads() + 0.5
    return crowded or any(_disturbed)


@torch.no_grad()
def measured(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, once it is warm."""
    taken: list[float] = []
    with quick_products(device):
        run()
        worked = time.process_time()
        while sum(taken) < LONG_ENOUGH:
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            taken.append(time.perf_counter() - begun)
        worked = time.process_time() - worked
    waited = device.type == "cpu" and worked < SHARE * sum(taken)
    _disturbed.append(waited or statistics.median(taken) / min(taken) > UNSTEADY)
    return sum(taken) / len(taken)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
