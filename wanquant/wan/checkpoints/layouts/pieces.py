"""What every layout is made of: a checkpoint of ours, and tensors that are made one at a time as they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.held import OPTIONAL
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.runs.files import replacing
from wanquant.wan.checkpoints.checkpoint import config_of, quantization_of, read_json, write_index
from wanquant.wan.checkpoints.names import PREFIXES, to_original
from wanquant.wan.checkpoints.stored import PLAIN
from wanquant.wan.checkpoints.tensor_files import Source, write_tensors

#: Before the authors' names in files that hold more than a transformer.
PREFIX = PREFIXES[0]


def _prefixed(name: str) -> str:
    return PREFIX + to_original(name)


#: By a naming, a tensor's or module's name from that of diffusers.
RENAME: dict[str, Callable[[str], str]] = {"diffusers": str, "original": to_original, "prefixed": _prefixed}


@dataclass(frozen=True)
class Piece:
    """A tensor of the target: what a description calls it, its type and shape, and how it is made."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one of our transformers, how its linears are quantized, and its config without that."""

    source: Source
    scheme: Scheme
    linears: frozenset[str]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Checkpoint:
        described = quantization_of(folder)
        if described is None:
            raise ValueError(f"{folder} holds no quantized transformer of ours")
        scheme = scheme_of(dataclasses.replace(config_of(described), packed=True))
        config = read_json(folder / "config.json")
        del config["quantization_config"]
        return cls(Source(folder, known=(*PLAIN, "U8")), scheme, frozenset(described["modules"]), config)

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def shape(self, linear: str) -> tuple[int, int]:
        """[out, in]."""
        rows, stored = self.source.tensors[f"{linear}.weight"].shape
        return rows, self.scheme.format.columns_of(stored)

    def plain_weight(self, linear: str) -> torch.Tensor:
        """What the codes of a linear mean, in BF16."""
        rows, columns = self.shape(linear)
        own = [part for part in OPTIONAL if self.has(f"{linear}.{part}")]
        layer = QuantLinear(columns, rows, False, self.scheme, own)
        layer.weight = nn.Parameter(self.source.read(f"{linear}.weight"), False)
        for name, buffer in layer.named_buffers():
            if buffer is not None:
                setattr(layer, name, self.source.read(f"{linear}.{name}"))
        return layer.dequantized().weight.detach()

    def as_it_is(self, name: str) -> Piece:
        stored = self.source.tensors[name]
        return Piece("FLOAT", stored.dtype, stored.shape, partial(self.source.read, name))

    def bias(self, linear: str) -> dict[str, Piece]:
        return {"bias": self.as_it_is(f"{linear}.bias")} if self.has(f"{linear}.bias") else {}

    def others(self) -> list[str]:
        """The tensors that belong to no quantized linear."""
        return [name for name in self.source.tensors if name.rpartition(".")[0] not in self.linears]

    def refuse_factors(self, layout: str) -> None:
        """``ValueError`` where smoothing has left factors in a linear, and the layout has no place for them; nor for
        what rotation and a low-rank branch leave."""
        self.refuse_others(layout)
        factored = [name for name in sorted(self.linears) if self.has(f"{name}.input_factor")]
        if factored:
            raise ValueError(f"quant.smoothing: {factored[0]} multiplies its input by factors, which {layout} has not")

    def refuse_others(self, layout: str) -> None:
        """``ValueError`` for rotated inputs and low-rank branches, which no engine's layout has a place for."""
        config = self.scheme.config
        for key, asked in (("rotation", config.rotation), ("low_rank", config.low_rank)):
            if asked:
                raise ValueError(f"quant.{key}={asked}: {layout} has no place for it, export as bf16")


def write_as_source(
    checkpoint: Checkpoint, target: Path, parts: Callable[[str], dict[str, Piece]], on_file: Callable[[], None]
) -> dict[str, Piece]:
    """In diffusers' names and files, each tensor in the file where it was; ``parts`` are a linear's tensors by the last
    part of their names. All that was written, by name."""
    source, total, kept, written = checkpoint.source, 0, dict[str, str](), dict[str, Piece]()
    for path in source.files:
        pieces: dict[str, Piece] = {}
        for name in (name for name, stored in source.tensors.items() if stored.path == path):
            linear, _, part = name.rpartition(".")
            if linear not in checkpoint.linears:
                pieces[name] = checkpoint.as_it_is(name)
            elif part == "weight":
                pieces |= {f"{linear}.{own}": piece for own, piece in parts(linear).items()}
        total += write(pieces, target / path.name)
        kept |= dict.fromkeys(pieces, path.name)
        written |= pieces
        on_file()
    if len(source.files) > 1:
        write_index(target, total, kept)
    return written


def write(pieces: Mapping[str, Piece], path: Path) -> int:
    """Bytes of tensors."""
    with replacing(path) as temporary:
        shapes = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
        return write_tensors(shapes, lambda name: pieces[name].make(), temporary)
