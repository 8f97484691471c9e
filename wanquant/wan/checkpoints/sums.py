"""Whether a checkpoint is what was written: the last file of one of ours, ``SHA256SUMS``, has the sum of every file
that is loaded. ``sha256sum --check SHA256SUMS`` says the same without us.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from wanquant.runs.files import SUMS, read_sums, sums_of, write_sums

#: Integers of as many bytes as a number has.
INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}


def model_files(folder: Path) -> list[Path]:
    """What makes a pipeline what it is; how to ask it for a video (``generation.json``) does not."""
    kinds = (".safetensors", ".json", ".model")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in kinds and p.name != "generation.json")


def seal(folder: Path, known: Mapping[Path, str] | None = None) -> None:
    """Writes the sums of a checkpoint that is complete; ``known`` are those that were taken while it was written."""
    known = known or {}
    files = model_files(folder)
    sums = {**known, **sums_of(path for path in files if path not in known)}
    write_sums(folder, {path: sums[path] for path in files})


def expected_sums(folder: Path) -> dict[Path, str]:
    """What is known of the files below ``folder``, a pipeline or one of its components; nothing of a model that came
    without sums."""
    for place in (folder, folder.parent):
        if (place / SUMS).is_file():
            return {path: sum_ for path, sum_ in read_sums(place).items() if path.is_relative_to(folder)}
    return {}


def check_sums(folder: Path) -> None:
    """``ValueError`` names the file that is missing, or not what was written."""
    refuse_missing(folder)
    refuse_changed(folder, sums_of(expected_sums(folder)))


def refuse_missing(folder: Path) -> None:
    for path in expected_sums(folder):
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is incomplete")


def refuse_changed(folder: Path, found: Mapping[Path, str]) -> None:
    """As ``check_sums``, of sums that are taken already."""
    for path, sum_ in expected_sums(folder).items():
        if found.get(path, sum_) != sum_:
            raise ValueError(
                f"{path} is not what was written (its SHA-256 is not that in {SUMS}): copy or make it again, or set "
                f"verify=false if it was changed on purpose"
            )


def check_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """``ValueError`` names the first tensor, on the CPU, that holds a NaN or an infinity, and its file in ``folder``.
    Codes hold them by right, where a format's overflow is inf."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or _is_finite(tensor):
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(
            f"{_file_of(name, folder)}: tensor {name} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} of "
            f"{tensor.numel()}: nothing can be measured on such a model"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """By the bits, which numpy reads as fast as memory gives them: among those of one sign, infinities and NaNs are the
    largest integers. ``torch.isfinite`` takes many times as long as it takes to load a tensor."""
    if tensor.itemsize not in INTEGERS:
        return bool(torch.isfinite(tensor).all())
    signed, unsigned = INTEGERS[tensor.itemsize]
    infinite = torch.tensor([math.inf, -math.inf], dtype=tensor.dtype).view(signed).numpy()
    bits = tensor.detach().contiguous().view(signed).numpy()
    return bool(bits.max() < infinite[0] and bits.view(unsigned).max() < infinite.view(unsigned)[1])


def _file_of(name: str, folder: Path) -> Path:
    """Where a tensor lies; the folder, of one that libraries have renamed."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return path
        except SafetensorError:
            continue
    return folder
