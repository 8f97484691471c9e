"""decord's interface, as far as VBench uses it, over PyAV, for hosts that decord has no wheel for (Linux on aarch64).

Both decode by FFmpeg and convert to RGB by its scaler, so that the frames are the same to the bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import av
import numpy as np
import torch


class NDArray:
    """What decord's native bridge gives."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def asnumpy(self) -> np.ndarray:
        return self._array


class Bridge(ModuleType):
    """``decord.bridge``: in which form frames are given."""

    form = "native"

    def set_bridge(self, form: str) -> None:
        if form not in ("native", "torch"):
            raise ValueError(f"bridge {form!r}: this reader knows native and torch")
        self.form = form


bridge = Bridge("decord.bridge")


class VideoReader:
    """All frames of a video, decoded when first asked for. Sizes have to be left alone: two versions of FFmpeg scale
    differently in the last bits, and the dimensions that scale while reading do not take custom input anyway."""

    def __init__(self, uri: str, ctx: Any = None, width: int = -1, height: int = -1, num_threads: int = 0) -> None:
        if (width, height) != (-1, -1):
            raise ValueError(f"{uri}: this reader does not scale; install decord")
        self._uri, self._threads = str(uri), num_threads
        with av.open(self._uri) as container:
            self._rate = float(container.streams.video[0].average_rate or 0)

    @cached_property
    def _all(self) -> np.ndarray:
        with av.open(self._uri) as container:
            container.streams.video[0].codec_context.thread_count = self._threads
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Any:
        return self._given(self._all[index])

    def get_batch(self, indices: Sequence[int]) -> Any:
        """uint8 [frames, height, width, 3]."""
        return self._given(self._all[np.asarray(indices, int)])

    def get_avg_fps(self) -> float:
        return self._rate

    def _given(self, array: np.ndarray) -> Any:
        return torch.from_numpy(array.copy()) if bridge.form == "torch" else NDArray(array)


def cpu(index: int = 0) -> str:
    """decord's name of a device; this reader has one."""
    return f"cpu({index})"


def stand_in() -> bool:
    """Where decord is not installed, ``import decord`` gets this reader from now on. Whether it does."""
    installed = False
    with contextlib.suppress(ModuleNotFoundError):
        installed = "decord" in sys.modules or importlib.util.find_spec("decord") is not None
    if not installed:
        module = ModuleType("decord")
        module.__dict__.update(VideoReader=VideoReader, bridge=bridge, cpu=cpu, __spec__=None)
        sys.modules["decord"], sys.modules["decord.bridge"] = module, bridge
    return stands_in()


def stands_in() -> bool:
    return getattr(sys.modules.get("decord"), "VideoReader", None) is VideoReader
