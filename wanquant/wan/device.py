"""Which device to run on. The only place that asks; ``torch_npu`` is imported only for an NPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path

import torch

DEVICES = ("auto", "npu", "cuda", "cpu")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes an NPU, else CUDA, else the CPU; a device asked for by name must be there."""
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (":" in name and (kind in ("auto", "cpu") or not index.isdecimal())):
        raise ValueError(f"model.device={name}: choose one of {', '.join(DEVICES)}, or a card, cuda:1")
    if kind == "auto":
        name = kind = "npu" if _npu_available() else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "npu" and not _npu_available():
        raise ValueError("model.device=npu: torch_npu finds no card (install the extra `npu` and CANN, or use cpu)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device=cuda: torch finds no CUDA device (use model.device=cpu)")
    if index and int(index) >= getattr(torch, kind).device_count():
        raise ValueError(f"model.device={name}: there are only {getattr(torch, kind).device_count()} of them")
    # The product of two HiF8 operands is exact in float32 and has to be summed there.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
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


#: What Linux keeps of a process: writing 5 forgets its peak (proc(5)).
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak_memory(device: torch.device) -> None:
    """So that the next job of a sweep, in the same process, does not report the peak of the one before."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats()
    elif _CLEAR.exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            _CLEAR.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device's allocator, or of the whole process on the CPU."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    if _STATUS.exists():
        status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    import resource

    # macOS counts bytes where Linux counts kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
