"""Tensors in safetensors files, read and written one at a time.

The library maps a whole file, whose pages count as the process's as long as one tensor of it is alive, and writes from
copies of all tensors at once. Where a checkpoint is larger than the memory neither will do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wanquant.wan.checkpoints.checkpoint import WEIGHTS, weight_files
from wanquant.wan.checkpoints.names import is_original, to_diffusers

#: Bytes written at a time: a whole tensor in one call takes twice as long.
AT_ONCE = 16_000_000
#: Types of numbers by their names in a file; first those that a model to be quantized may have.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {**PLAIN, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: in which file, from which byte on and how many; its type and shape."""

    path: Path
    first: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A transformer's tensors, wherever they are, by diffusers' names."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, folder: Path, known: Collection[str] = PLAIN) -> Source:
        """``ValueError`` for a tensor of another than the ``known`` types."""
        found: dict[str, Stored] = {}
        for path in (folder / name for name in weight_files(folder)):
            with path.open("rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(begin - 8))
            with safe_open(path, "pt"):
                pass  # refuses what is truncated
            header.pop("__metadata__", None)
            for name, told in header.items():
                if told["dtype"] not in known:
                    raise ValueError(f"{path}: tensor {name} is {told['dtype']}, not one of {', '.join(known)}")
                first, end = told["data_offsets"]
                found[name] = Stored(path, begin + first, end - first, TYPES[told["dtype"]], tuple(told["shape"]))
        original = any(map(is_original, found))
        return cls(folder, {to_diffusers(name) if original else name: stored for name, stored in found.items()})

    @property
    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self.tensors.values()})

    def expect(self, names: Iterable[str]) -> None:
        """Lets the system bring them from the disk while something else is done; they are not this process's yet."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            stored = self.tensors[name]
            with stored.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), stored.first, stored.size, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> torch.Tensor:
        """In the type it is stored in. Not mapped: what was read would stay in memory with the map."""
        stored = self.tensors[name]
        data = torch.empty(stored.size, dtype=torch.uint8)
        with stored.path.open("rb") as file:
            file.seek(stored.first)
            if file.readinto(data.numpy().data) != stored.size:
                raise ValueError(f"{stored.path} ends within tensor {name}")
        return data.view(stored.dtype).view(stored.shape)

    def identity(self) -> list[Any]:
        """By which it is known again without reading it."""
        paths = [self.folder / "config.json", *self.files]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def file_names(count: int) -> list[str]:
    """As diffusers names the files of a model."""
    stem = WEIGHTS.removesuffix(".safetensors")
    return [WEIGHTS] if count == 1 else [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_tensors(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], fetch: Callable[[str], torch.Tensor], path: Path
) -> int:
    """A safetensors file of these tensors, fetched one by one as it is written; its bytes of tensors. The library's
    ``save_file`` wants all of them at once and copies them before it writes the first."""
    # As the library orders them, so that each number lies where its size asks for.
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    called = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    past = 0
    for name in names:
        (dtype, shape), first = shapes[name], past
        past += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": called[dtype], "shape": list(shape), "data_offsets": [first, past]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name in names:
            tensor = fetch(name)
            assert (tensor.dtype, tuple(tensor.shape)) == shapes[name], name
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for first in range(0, len(data), AT_ONCE):
                file.write(data[first : first + AT_ONCE])
    return past
