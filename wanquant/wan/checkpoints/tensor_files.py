"""Tensors in safetensors files, read and written one at a time.

The library maps a whole file, whose pages count as the process's as long as one tensor of it is alive, and writes from
copies of all tensors at once. Where a checkpoint is larger than the memory neither will do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wanquant.wan.checkpoints.checkpoint import INDEX, WEIGHTS, read_json
from wanquant.wan.checkpoints.names import is_original, to_diffusers

#: Bytes of a tensor whose file is mapped for it alone.
LARGE = 4_000_000
#: Bytes written at a time: a whole tensor in one call takes twice as long.
AT_ONCE = 16_000_000
#: A number of each type that a source may have.
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: And of each that is written.
WRITTEN = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: in which file, under what name and from which byte on; its bytes, type (as safetensors calls
    it) and shape."""

    path: Path
    name: str
    first: int
    size: int
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A transformer's tensors, wherever they are, by diffusers' names."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, folder: Path, known: Mapping[str, int] = BYTES) -> Source:
        """``ValueError`` for a tensor of another than the ``known`` types, of which the bytes of a number are given."""
        index = folder / INDEX
        paths = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
        found: list[Stored] = []
        for path in (folder / name for name in paths):
            places = _places(path)
            with safe_open(path, "pt") as file:
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in known:
                        raise ValueError(f"{path}: tensor {name} is {part.get_dtype()}, not one of {', '.join(known)}")
                    kind, shape = part.get_dtype(), tuple(part.get_shape())
                    found.append(Stored(path, name, places[name], math.prod(shape) * known[kind], kind, shape))
        original = any(is_original(stored.name) for stored in found)
        return cls(folder, {to_diffusers(each.name) if original else each.name: each for each in found})

    @property
    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self.tensors.values()})

    def read(self, kinds: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Copies. A file is mapped for each large tensor anew: what was read would stay in memory with the map."""
        found: dict[str, torch.Tensor] = {}
        for path in self.files:
            here = {name: self.tensors[name] for name in kinds if self.tensors[name].path == path}
            small = [name for name, stored in here.items() if stored.size < LARGE]
            for together in [small, *([name] for name in here if name not in small)]:
                if not together:
                    continue
                with safe_open(path, "pt") as file:
                    for name in together:
                        found[name] = file.get_tensor(here[name].name).to(kinds[name], copy=True)
        return found

    def expect(self, names: Iterable[str]) -> None:
        """Lets the system bring them from the disk while something else is done; they are not this process's yet."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            stored = self.tensors[name]
            with stored.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), stored.first, stored.size, os.POSIX_FADV_WILLNEED)

    def raw(self, name: str) -> torch.Tensor:
        """A copy, in the type it is stored in."""
        with safe_open(self.tensors[name].path, "pt") as file:
            found: torch.Tensor = file.get_tensor(self.tensors[name].name).clone()
        return found

    def identity(self) -> list[Any]:
        """By which it is known again without reading it."""
        paths = [self.folder / "config.json", *self.files]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _places(path: Path) -> dict[str, int]:
    """At which byte of the file each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}


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
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    past = 0
    for name in names:
        (dtype, shape), first = shapes[name], past
        past += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": WRITTEN[dtype], "shape": list(shape), "data_offsets": [first, past]}
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
