"""Tensors in safetensors files, read and written one at a time.

The library maps a whole file, whose pages count as the process's as long as one tensor of it is alive, and writes from
copies of all tensors at once. Where a checkpoint is larger than the memory neither will do.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanquant.wan.checkpoints.checkpoint import (
    WEIGHTS,
    check_keys,
    kept_in_fp32,
    quantization_of,
    read_json,
    weight_files,
)
from wanquant.wan.checkpoints.names import (
    TELLING,
    Naming,
    config_from_shapes,
    config_to_diffusers,
    is_original_config,
    is_wans,
)
from wanquant.wan.checkpoints.stored import FP8, PLAIN, TYPES, Stored, stored_in, with_scales
from wanquant.wan.checkpoints.sums import check_finite

#: Bytes written at a time: a whole tensor in one call takes twice as long.
AT_ONCE = 16_000_000
#: Files that hold a transformer.
SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Source:
    """A transformer as it lies on the disk, in whatever layout: its diffusers config, and its tensors by diffusers'
    names, each found by the headers and read when it is asked for.

    ``path`` is its folder, or a single file; ``like`` a ``config.json`` that may tell what a file's shapes do not;
    ``known`` the types its tensors may have."""

    path: Path
    like: Path | None = None
    known: tuple[str, ...] = (*PLAIN, *FP8)

    @classmethod
    def of(cls, where: Path | Source) -> Source:
        return where if isinstance(where, Source) else cls(where)

    @property
    def is_file(self) -> bool:
        return self.path.suffix in SUFFIXES and not self.path.is_dir()

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.is_file else [self.path / name for name in weight_files(self.path)]

    @property
    def is_there(self) -> bool:
        """Whether it has weights, of a folder that may have its JSON files alone."""
        return all(path.is_file() for path in self.files)

    @property
    def as_diffusers(self) -> bool:
        """Whether it is a folder that diffusers itself reads."""
        described = self.path / "config.json"
        return not self.is_file and described.is_file() and not is_original_config(read_json(described))

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        """By the names in the files."""
        return with_scales(
            {name: stored for path in self.files for name, stored in stored_in(path, self.known).items()}
        )

    @cached_property
    def naming(self) -> Naming:
        return Naming.of(self._stored)

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        named = ((self.naming.ours(name), stored) for name, stored in self._stored.items())
        return {name: stored for name, stored in named if name is not None}

    @cached_property
    def config(self) -> dict[str, Any]:
        """``ValueError`` for another model's."""
        if not self.is_file and (self.path / "config.json").is_file():
            return _in_diffusers(read_json(self.path / "config.json"))
        if not self.tensors.keys() >= set(TELLING):
            strange = [*self._strange, *(stored.name for name, stored in self.tensors.items() if not is_wans(name))]
            check_keys(self._called(TELLING), self._called(set(TELLING) & set(self.tensors)), self.path, strange)
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        try:
            return config_from_shapes(shapes, self._alike())
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _alike(self) -> Iterator[dict[str, Any]]:
        """Configs of Wan transformers, one beside a file and the one it is ``like``, if they are there."""
        for path in (self.path.parent / "config.json", self.like):
            described = read_json(path) if path is not None and path.is_file() else {}
            if described.get("_class_name") == "WanModel" or "attention_head_dim" in described:
                yield _in_diffusers(described)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """As ``quantization_of``."""
        return quantization_of(self.path) if self.as_diffusers else None

    def check(self, transformer: nn.Module) -> None:
        """``ValueError`` names the first tensor that the transformer has and this has not, and the other way round,
        and one of another shape."""
        wanted = transformer.state_dict()
        strange = [*self._strange, *(stored.name for name, stored in self.tensors.items() if name not in wanted)]
        there = self._called(name for name in wanted if name in self.tensors)
        check_keys(self._called(wanted), there, self.path, strange)
        for name, tensor in wanted.items():
            stored = self.tensors[name]
            if stored.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{self.path}: tensor {stored.name} is {list(stored.shape)}, and not {list(tensor.shape)}"
                )

    def _called(self, names: Iterable[str]) -> list[str]:
        return [self.naming.theirs(name) for name in names]

    @property
    def _strange(self) -> list[str]:
        """Names that mean no tensor of Wan's."""
        return [name for name in self._stored if self.naming.ours(name) is None]

    @cached_property
    def kinds(self) -> dict[str, int]:
        """Of what is no plain number in the files, how many tensors there are."""
        return dict(Counter(stored.kind for stored in self.tensors.values() if stored.kind))

    @property
    def told(self) -> dict[str, Any]:
        """What is worth knowing of it, for a result; nothing of diffusers' own layout."""
        if self.as_diffusers and (self.quantization is not None or not self.kinds):
            return {}
        naming = "the authors'" if self.naming.original else "diffusers'"
        return {"path": str(self.path), "names": naming, "tensors": len(self.tensors), "dequantized": self.kinds}

    @property
    def dequantized(self) -> str:
        """A sentence on ``kinds``; empty where there are none."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return counts and f"{self.path}: of {len(self.tensors)} tensors {counts}, dequantized to BF16"

    def expect(self, names: Iterable[str]) -> None:
        """Lets the system bring them from the disk while something else is done; they are not this process's yet."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            stored = self.tensors[name]
            with stored.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), stored.first, stored.size, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> torch.Tensor:
        """As ``Stored.read``."""
        return self.tensors[name].read()

    def read_for(self, transformer: nn.Module, name: str) -> torch.Tensor:
        """In BF16, or float32 where the transformer is kept so; ``ValueError`` for a value that is not finite."""
        tensor = self.read(name)
        check_finite({self.tensors[name].name: tensor}, self.tensors[name].path)
        return tensor.to(torch.float32 if kept_in_fp32(transformer, name) else torch.bfloat16)

    def stamps(self) -> list[Any]:
        """By which a process sees that the files have changed meanwhile."""
        paths = [path for path in (self.path / "config.json", *self.files) if path.is_file()]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _in_diffusers(described: dict[str, Any]) -> dict[str, Any]:
    return config_to_diffusers(described) if is_original_config(described) else described


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
