"""What several layers make of the same input, made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class LastInput:
    """The input that was rounded last and its rounding, shared by the layers that get the same one: ``to_q``, ``to_k``
    and ``to_v`` do. Rounding it once saves time, and in training two copies of it kept for the backward pass."""

    def __init__(self) -> None:
        #: The tensor, its version and what else the rounding depends on, and what was found; read and set as one.
        self._last: tuple[weakref.ref[torch.Tensor], Any, Any] | None = None

    def rounded(self, x: torch.Tensor, round_: Callable[[], Any], of: object = None) -> Any:
        """``round_()``, or what it was for the same tensor with the same contents and the same ``of``; forgotten with
        the tensor."""
        if x.is_inference():  # its contents have no version
            return round_()
        last, key = self._last, (x._version, of)
        if last is not None and last[0]() is x and last[1] == key:
            return last[2]
        self._last = last = None  # not both at once
        found = round_()
        self._last = weakref.ref(x, self._forget), key, found
        return found

    def _forget(self, dead: object) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastInput:
        return LastInput()

    def __reduce__(self) -> tuple[type[LastInput], tuple[()]]:
        return LastInput, ()
