"""Which device to run on. The only place that asks; ``torch_npu`` is imported only for an NPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from wanquant.runs import launch

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


#: Which cards a process may see, by their numbers in the machine.
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}


@contextlib.contextmanager
def one_card(device: torch.device) -> Iterator[torch.device]:
    """A card for this job alone, where none was asked for by number: the first that no other job of this user has. Of
    the processes of a launch each takes that of its number on the machine, ``LOCAL_RANK``."""
    if device.type == "cpu":
        yield device
        return
    backend = getattr(torch, device.type)
    if device.index is not None:
        backend.set_device(device.index)
        yield device
        return
    cards = launched_cards(backend.device_count())
    with first_free([_card_name(device.type, index) for index in cards]) as place:
        backend.set_device(cards[place])
        yield torch.device(device.type, cards[place])


def launched_cards(count: int) -> Sequence[int]:
    """Of so many cards those that this process may take."""
    if launch.processes() == 1:
        return range(count)
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= count:
        raise ValueError(f"this machine has {count} cards, and each process takes one: lower --num_processes")
    return [own]


def _card_name(kind: str, index: int) -> str:
    """What the machine calls the card: its number among those this process may see is not the same in every job."""
    unique = getattr(getattr(torch, kind).get_device_properties(index), "uuid", None)
    if unique is not None:
        return f"{kind}-{unique}"
    seen = [name for name in os.environ.get(VISIBLE[kind], "").split(",") if name]
    return f"{kind}-{seen[index] if index < len(seen) else index}"


@contextlib.contextmanager
def first_free(names: Sequence[str], folder: Path | None = None) -> Iterator[int]:
    """The place of the first of the names that no other process holds, held while entered; waits for one. A lock is
    the operating system's and dies with its holder."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"wanquant-{user}" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
            if lock.is_locked:
                try:
                    yield index
                finally:
                    lock.release()
                return
        if not waited:
            print(f"waiting for a card: other jobs have {', '.join(names)}", file=sys.stderr, flush=True)
        waited = True
        time.sleep(0.5)


def _npu_available() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError):
        # Installed, but CANN is missing: there is no NPU to be had here.
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


#: What a plain RuntimeError says of torch's CPU allocator, and of a file that could not be mapped.
_TOLD = ("DefaultCPUAllocator", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in _TOLD)


#: What Linux keeps of a process: writing 5 forgets its peak (proc(5)).
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak_memory(device: torch.device) -> None:
    """So that the next job of a sweep, in the same process, does not report the peak of the one before."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats()
    elif _CLEAR.exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            _CLEAR.write_text("5")


def give_back_freed_memory() -> None:
    """Lets glibc return what is freed from 1 MB on: by itself it comes to keep pieces of up to 32 MB, in holes
    (mallopt(3), M_MMAP_THRESHOLD). Elsewhere nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process may still have, of the device and of the host."""
    host = int(psutil.virtual_memory().available)
    if device.type == "cpu":
        return host, host
    backend = getattr(torch, device.type)
    kept = backend.memory_reserved(device) - backend.memory_allocated(device)  # by torch's allocator
    return int(backend.mem_get_info(device)[0]) + int(kept), host


def resident_memory(device: torch.device) -> int:
    """Bytes in use now, as ``peak_memory`` counts them; 0 where the system does not tell."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).memory_allocated(device))
    return _told_by_system("VmRSS") if _STATUS.exists() else 0


def _told_by_system(name: str) -> int:
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device's allocator, or of the whole process on the CPU."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    if _STATUS.exists():
        return _told_by_system("VmHWM")
    import resource

    # macOS counts bytes where Linux counts kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
