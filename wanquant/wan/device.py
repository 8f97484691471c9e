"""Which device to run on. The only place that asks; ``torch_npu`` is imported only for an NPU."""

from __future__ import annotations

import importlib
import importlib.util

import torch

DEVICES = ("auto", "npu", "cuda", "cpu")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes an NPU, else CUDA, else the CPU; a device asked for by name must be there."""
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"model.device={name}: choose one of {', '.join(DEVICES)}")
    if kind == "auto":
        return torch.device("npu" if _npu_available() else "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "npu" and not _npu_available():
        raise ValueError("model.device=npu: torch_npu finds no card (install the extra `npu` and CANN, or use cpu)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device=cuda: torch finds no CUDA device (use model.device=cpu)")
    return torch.device(name)


def _npu_available() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError):
        # Installed, but CANN is missing: there is no NPU to be had here.
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device's allocator, or of the whole process (VmHWM) on the CPU."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(getattr(torch, device.type).max_memory_allocated(device))
