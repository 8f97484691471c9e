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
        #: The tensor, its version and what else the rounding depends on, what was found, and which layers have it;
        #: read and set as one.
        self._last: tuple[weakref.ref[torch.Tensor], Any, Any, set[int]] | None = None

    def rounded(self, x: torch.Tensor, round_: Callable[[], Any], of: object = None, by: object = None) -> Any:
        """``round_()``, or what it was for the same tensor with the same contents and the same ``of``; forgotten with
        the tensor. A layer that says who it is (``by``) gets what it had once not again: that would be another pass,
        whose input may have been written to behind torch's back, as a CUDA graph does."""
        if x.is_inference():  # its contents have no version
            return round_()
        last, key = self._last, (x._version, of)
        if last is not None and last[0]() is x and last[1] == key and id(by) not in last[3]:
            if by is not None:
                last[3].add(id(by))
            return last[2]
        self._last = last = None  # not both at once
        found = round_()
        self._last = weakref.ref(x, self._forget), key, found, set() if by is None else {id(by)}
        return found

    def _forget(self, dead: object) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastInput:
        return LastInput()

    def __reduce__(self) -> tuple[type[LastInput], tuple[()]]:
        return LastInput, ()
