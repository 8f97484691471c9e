"""Our checkpoints in the layouts of other engines, from files to files, a tensor at a time.

``bf16``       what the codes mean, as a plain BF16 model in diffusers' layout, for engines without the format. Scales
               that are no powers of two round each weight once more; activations are not rounded any more.
``mindie-sd``  ``quant_model_description_<type>.json`` and ``quant_model_weight_<type>.safetensors``, as msModelSlim
               writes them (its ``mindie_format.py``) and MindIE-SD reads them (its ``quantize.py`` and ``layer.py``):

    W8A8_DYNAMIC   INT8, a scale a row, dynamic activations     weight, weight_scale [out, 1], weight_offset, bias
    W8A8           INT8, a scale a row, static activations      weight, input_scale, input_offset, deq_scale, quant_bias
    W8A8_MXFP8     MXFP8                                        weight, weight_scale (exponents + 127), bias
    W8A8_HIFLOAT8  HiF8, as W8A8_DYNAMIC, with codes in uint8   no engine that reads it is known

None of these engines runs without its card, so what they do with it has not been seen.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.progress import progress
from wanquant.wan.checkpoints.checkpoint import (
    config_of,
    quantization_of,
    read_json,
    whole_folder,
    write_index,
    write_json,
)
from wanquant.wan.checkpoints.names import LAYOUTS, NAMINGS, to_original
from wanquant.wan.checkpoints.tensor_files import PLAIN, Source, write_tensors
from wanquant.wan.load import transformers_of


@dataclass(frozen=True)
class Piece:
    """A tensor of the target: what the description calls it, its type and shape, and how it is made."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one of our transformers, and how its linears are quantized."""

    source: Source
    scheme: Scheme
    linears: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> Checkpoint:
        described = quantization_of(folder)
        if described is None:
            raise ValueError(f"{folder} holds no quantized transformer of ours")
        scheme = scheme_of(dataclasses.replace(config_of(described), packed=True))
        return cls(Source.of(folder, [*PLAIN, "U8"]), scheme, frozenset(described["modules"]))

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def plain_weight(self, name: str) -> torch.Tensor:
        """What the codes of a linear mean, in BF16."""
        rows, columns = self.source.tensors[f"{name}.weight"].shape
        layer = QuantLinear(columns, rows, False, self.scheme, self.has(f"{name}.input_factor"))
        layer.weight = nn.Parameter(self.source.read(f"{name}.weight"), False)
        layer.weight_scale = self.source.read(f"{name}.weight_scale")
        if layer.input_factor is not None:
            layer.input_factor = self.source.read(f"{name}.input_factor")
        return layer.dequantized().weight.detach()

    def as_it_is(self, name: str) -> Piece:
        stored = self.source.tensors[name]
        return Piece("FLOAT", stored.dtype, stored.shape, partial(self.source.read, name))


def export_all(checkpoint: Path, target: Path, layout: str, naming: str) -> None:
    """A whole quantized pipeline, its transformers one by one and the rest copied, or a transformer alone."""
    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
    if (checkpoint / "checkpoint").is_dir():
        raise ValueError(f"{checkpoint} is a run: its checkpoint is {checkpoint / 'checkpoint'}")
    parts = transformers_of(checkpoint)
    files = sum(len(list(part.glob("*.safetensors"))) for part in parts.values()) if layout == "bf16" else len(parts)
    with progress("export", files, "file") as tick:
        if "" in parts:
            export(checkpoint, target, layout, naming, tick)
            return
        _refuse_existing(target)
        plain = [name for name, part in parts.items() if quantization_of(part) is None]
        plain = plain if len(plain) < len(parts) else []  # of which nothing could be exported
        with whole_folder(target) as partial_target:
            for name, part in parts.items():
                if layout == "bf16" and name in plain:
                    shutil.copytree(part, partial_target / name)
                else:
                    export(part, partial_target / name, layout, naming, tick)
            for path in checkpoint.iterdir() if layout == "bf16" else ():
                if path.is_dir() and path.name not in parts:
                    shutil.copytree(path, partial_target / path.name)
                elif path.is_file():
                    shutil.copy2(path, partial_target / path.name)


def export(
    folder: Path, target: Path, layout: str, naming: str = "diffusers", on_file: Callable[[], None] = lambda: None
) -> None:
    """Writes the transformer in ``folder`` to ``target``, which must not be there. ``on_file`` is called after each
    file."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    if naming not in NAMINGS:
        raise ValueError(f"naming {naming!r}: choose {' or '.join(NAMINGS)}")
    if layout == "bf16" and naming != "diffusers":
        raise ValueError("layout bf16 is diffusers': it has diffusers' names")
    checkpoint = Checkpoint.of(folder)
    _refuse_existing(target)
    with whole_folder(target) as partial_target:
        if layout == "bf16":
            _write_bf16(checkpoint, partial_target, on_file)
        else:
            _write_mindie(checkpoint, partial_target, to_original if naming == "original" else str)
            on_file()
        described = read_json(folder / "config.json")
        described.pop("quantization_config")
        write_json(partial_target / "config.json", described)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} is there already: choose another folder, or remove it")


def _write_bf16(checkpoint: Checkpoint, target: Path, on_file: Callable[[], None]) -> None:
    """File by file."""
    source, total, kept = checkpoint.source, 0, dict[str, str]()
    for path in source.files:
        pieces: dict[str, Piece] = {}
        for name in (name for name, stored in source.tensors.items() if stored.path == path):
            linear, _, part = name.rpartition(".")
            if linear not in checkpoint.linears or part == "bias":
                pieces[name] = checkpoint.as_it_is(name)
            elif part == "weight":
                make = partial(checkpoint.plain_weight, linear)
                pieces[name] = Piece("FLOAT", torch.bfloat16, source.tensors[name].shape, make)
        total += _write(pieces, target / path.name)
        kept |= dict.fromkeys(pieces, path.name)
        on_file()
    if len(source.files) > 1:
        write_index(target, total, kept)


def _write_mindie(checkpoint: Checkpoint, target: Path, rename: Callable[[str], str]) -> None:
    """In one file of weights: MindIE-SD takes no more."""
    kind = _mindie_type(checkpoint.scheme)
    others = [name for name in checkpoint.source.tensors if name.rpartition(".")[0] not in checkpoint.linears]
    pieces = {rename(name): checkpoint.as_it_is(name) for name in others}
    for name in checkpoint.linears:
        own = rename(name)
        if checkpoint.has(f"{name}.input_factor"):
            # By which the engine multiplies the input; the linear is then looked for one name deeper.
            pieces[f"{own}.div.mul_scale"] = checkpoint.as_it_is(f"{name}.input_factor")
            own = f"{own}.linear"
        pieces |= {f"{own}.{part}": piece for part, piece in _mindie_linear(checkpoint, name, kind).items()}
    _write(pieces, target / f"quant_model_weight_{kind.lower()}.safetensors")
    told = {"model_quant_type": kind, "version": "1.0.0"}
    told |= {name: piece.kind for name, piece in sorted(pieces.items())}
    write_atomic(target / f"quant_model_description_{kind.lower()}.json", json.dumps(told, indent=2) + "\n")


def _mindie_type(scheme: Scheme) -> str:
    if scheme.attention != "off":
        raise ValueError(f"quant.attention={scheme.attention}: MindIE-SD quantizes attention in other ways")
    name, static = scheme.format.name, scheme.act_static
    if name == "int8":
        return "W8A8" if static else "W8A8_DYNAMIC"
    known = {"mxfp8": "W8A8_MXFP8", "hif8": "W8A8_HIFLOAT8"}
    if name not in known or static:
        raise ValueError(f"MindIE-SD's layout has no {'static ' if static else ''}{name}: int8, mxfp8 or dynamic hif8")
    return known[name]


#: In which type MindIE-SD keeps the codes.
CODES = {"W8A8_MXFP8": torch.float8_e4m3fn, "W8A8_HIFLOAT8": torch.uint8}


def _mindie_linear(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Piece]:
    """Its tensors, by what the layout calls them."""
    source, (rows, columns) = checkpoint.source, checkpoint.source.tensors[f"{name}.weight"].shape
    biased, codes, float32 = checkpoint.has(f"{name}.bias"), CODES.get(kind, torch.int8), torch.float32

    def read(part: str) -> torch.Tensor:
        return source.read(f"{name}.{part}")

    def row_scales() -> torch.Tensor:
        return read("weight_scale").expand(rows).clone()

    def output_scales() -> torch.Tensor:
        return row_scales() * read("input_scale")

    def bias_in_steps() -> torch.Tensor:
        bias = read("bias").float() if biased else torch.zeros(rows)
        return (bias / output_scales()).round().to(torch.int32)

    pieces = {"bias": Piece("FLOAT", float32, (rows,), lambda: read("bias").float())} if biased else {}
    pieces["weight"] = Piece(kind, codes, (rows, columns), lambda: read("weight").view(codes))
    if kind == "W8A8_MXFP8":
        shape = source.tensors[f"{name}.weight_scale"].shape
        pieces["weight_scale"] = Piece(
            kind, torch.uint8, shape, lambda: (read("weight_scale").log2() + 127).to(torch.uint8)
        )
    elif kind == "W8A8":
        pieces["input_scale"] = Piece(kind, float32, (1,), lambda: read("input_scale")[None])
        pieces["input_offset"] = Piece(kind, float32, (1,), lambda: torch.zeros(1))
        pieces["deq_scale"] = Piece(kind, float32, (rows,), output_scales)
        pieces["quant_bias"] = Piece(kind, torch.int32, (rows,), bias_in_steps)
    else:
        pieces["weight_scale"] = Piece(kind, float32, (rows, 1), lambda: row_scales()[:, None])
        pieces["weight_offset"] = Piece(kind, float32, (rows, 1), lambda: torch.zeros(rows, 1))
    return pieces


def _write(pieces: dict[str, Piece], path: Path) -> int:
    """Bytes of tensors."""
    with replacing(path) as temporary:
        shapes = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
        return write_tensors(shapes, lambda name: pieces[name].make(), temporary)
