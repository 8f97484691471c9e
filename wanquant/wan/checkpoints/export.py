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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.scale import PerBlock
from wanquant.quant.scheme import Scheme, parse
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.progress import progress
from wanquant.wan.checkpoints.checkpoint import INDEX, config_of, quantization_of, read_json
from wanquant.wan.checkpoints.names import LAYOUTS, NAMINGS, to_original
from wanquant.wan.checkpoints.tensor_files import BYTES, WRITTEN, Source, write_tensors
from wanquant.wan.load import transformers_of

#: torch's types by their names in a file.
TYPES = {name: dtype for dtype, name in WRITTEN.items()}


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
    linears: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Checkpoint:
        described = quantization_of(folder)
        if described is None:
            raise ValueError(f"{folder} holds no quantized transformer of ours")
        scheme = parse(dataclasses.replace(config_of(described), packed=True))
        return cls(Source.of(folder, {**BYTES, "U8": 1}), scheme, tuple(described["modules"]))

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def layer(self, name: str) -> QuantLinear:
        """Read now."""
        parts = ("weight", "weight_scale", "input_scale", "input_factor", "bias")
        found = {part: self.source.raw(f"{name}.{part}") for part in parts if self.has(f"{name}.{part}")}
        rows, columns = found["weight"].shape
        layer = QuantLinear(columns, rows, "bias" in found, self.scheme, "input_factor" in found)
        for part, tensor in found.items():
            setattr(layer, part, nn.Parameter(tensor, False) if part in ("weight", "bias") else tensor)
        return layer

    def others(self) -> list[str]:
        """The tensors that belong to no quantized linear."""
        return [name for name in self.source.tensors if name.rpartition(".")[0] not in self.linears]

    def as_it_is(self, name: str) -> Piece:
        stored = self.source.tensors[name]
        return Piece("FLOAT", TYPES[stored.kind], stored.shape, lambda: self.source.raw(name))


def export(
    folder: Path, target: Path, layout: str, naming: str = "diffusers", on_file: Callable[[], None] = lambda: None
) -> list[Path]:
    """Writes the transformer in ``folder`` to ``target``, which must not be there; the files it wrote. ``on_file`` is
    called after each."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    if naming not in NAMINGS:
        raise ValueError(f"naming {naming!r}: choose {' or '.join(NAMINGS)}")
    if layout == "bf16" and naming != "diffusers":
        raise ValueError("layout bf16 is diffusers': it has diffusers' names")
    checkpoint = Checkpoint.of(folder)
    partial = target.with_name(f"{target.name}.partial")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another folder, or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write = _write_bf16 if layout == "bf16" else _write_mindie
        write(checkpoint, partial, to_original if naming == "original" else lambda name: name, on_file)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(target.iterdir())


def _write_bf16(
    checkpoint: Checkpoint, target: Path, rename: Callable[[str], str], on_file: Callable[[], None]
) -> None:
    """File by file."""
    source, skipped = checkpoint.source, {"weight_scale", "input_scale", "input_factor"}
    kept: dict[str, str] = {}
    for path in source.files:
        pieces: dict[str, Piece] = {}
        for name in (name for name, stored in source.tensors.items() if stored.path == path):
            linear, _, part = name.rpartition(".")
            if linear not in checkpoint.linears or part == "bias":
                pieces[name] = checkpoint.as_it_is(name)
            elif part not in skipped:
                shape = source.tensors[name].shape
                pieces[name] = Piece("FLOAT", torch.bfloat16, shape, _meaning(checkpoint, linear))
        _write(pieces, target / path.name)
        kept |= dict.fromkeys(pieces, path.name)
        on_file()
    if len(source.files) > 1:
        index = {"metadata": {"total_size": sum(_bytes(target / p.name) for p in source.files)}, "weight_map": kept}
        write_atomic(target / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write_config(source.folder, target)


def _meaning(checkpoint: Checkpoint, name: str) -> Callable[[], torch.Tensor]:
    return lambda: checkpoint.layer(name).dequantized().weight.detach()


def _bytes(path: Path) -> int:
    """Of its tensors."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _write_mindie(
    checkpoint: Checkpoint, target: Path, rename: Callable[[str], str], on_file: Callable[[], None]
) -> None:
    """In one file of weights: MindIE-SD takes no more."""
    kind = _mindie_type(checkpoint)
    pieces = {rename(name): checkpoint.as_it_is(name) for name in checkpoint.others()}
    for name in checkpoint.linears:
        own = rename(name)
        if checkpoint.has(f"{name}.input_factor"):
            # By which the engine multiplies the input; the linear is then looked for one name deeper.
            pieces[f"{own}.div.mul_scale"] = checkpoint.as_it_is(f"{name}.input_factor")
            own = f"{own}.linear"
        pieces |= {f"{own}.{part}": piece for part, piece in _mindie_linear(checkpoint, name, kind).items()}
    _write(pieces, target / f"quant_model_weight_{kind.lower()}.safetensors")
    on_file()
    told = {
        "model_quant_type": kind,
        "version": "1.0.0",
        **{name: piece.kind for name, piece in sorted(pieces.items())},
    }
    write_atomic(target / f"quant_model_description_{kind.lower()}.json", json.dumps(told, indent=2) + "\n")
    _write_config(checkpoint.source.folder, target)


def _mindie_type(checkpoint: Checkpoint) -> str:
    scheme = checkpoint.scheme
    if scheme.attention != "off":
        raise ValueError(f"quant.attention={scheme.attention}: MindIE-SD quantizes attention in other ways")
    name, static = scheme.format.name, scheme.act_static
    if name == "int8":
        return "W8A8" if static else "W8A8_DYNAMIC"
    known = {"mxfp8": "W8A8_MXFP8", "hif8": "W8A8_HIFLOAT8"}
    if name not in known or static:
        raise ValueError(f"MindIE-SD's layout has no {'static ' if static else ''}{name}: int8, mxfp8 or dynamic hif8")
    return known[name]


def _mindie_linear(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Piece]:
    rows, columns = checkpoint.source.tensors[f"{name}.weight"].shape
    scale = f"{name}.weight_scale"

    def by_row() -> torch.Tensor:
        return checkpoint.source.raw(scale).expand(rows).clone()

    def codes(as_type: torch.dtype) -> Piece:
        return Piece(kind, as_type, (rows, columns), lambda: checkpoint.source.raw(f"{name}.weight").view(as_type))

    pieces: dict[str, Piece] = {}
    if checkpoint.has(f"{name}.bias"):
        pieces["bias"] = Piece("FLOAT", torch.float32, (rows,), lambda: checkpoint.source.raw(f"{name}.bias").float())
    if kind == "W8A8_MXFP8":
        assert isinstance(checkpoint.scheme.weight_granularity, PerBlock)
        shape = checkpoint.source.tensors[scale].shape

        def exponents() -> torch.Tensor:
            return (checkpoint.source.raw(scale).log2() + 127).to(torch.uint8)

        return {
            **pieces,
            "weight": codes(torch.float8_e4m3fn),
            "weight_scale": Piece(kind, torch.uint8, shape, exponents),
        }
    pieces["weight"] = codes(torch.uint8 if kind == "W8A8_HIFLOAT8" else torch.int8)
    if kind != "W8A8":
        column = (rows, 1)
        pieces["weight_scale"] = Piece(kind, torch.float32, column, lambda: by_row()[:, None])
        pieces["weight_offset"] = Piece(kind, torch.float32, column, lambda: torch.zeros(column))
        return pieces

    def both() -> torch.Tensor:
        return by_row() * checkpoint.source.raw(f"{name}.input_scale")

    def bias_in_steps() -> torch.Tensor:
        bias = pieces["bias"].make() if "bias" in pieces else torch.zeros(rows)
        return (bias / both()).round().to(torch.int32)

    pieces["input_scale"] = Piece(kind, torch.float32, (1,), lambda: checkpoint.source.raw(f"{name}.input_scale")[None])
    pieces["input_offset"] = Piece(kind, torch.float32, (1,), lambda: torch.zeros(1))
    pieces["deq_scale"] = Piece(kind, torch.float32, (rows,), both)
    pieces["quant_bias"] = Piece(kind, torch.int32, (rows,), bias_in_steps)
    return pieces


def _write(pieces: dict[str, Piece], path: Path) -> None:
    with replacing(path) as temporary:
        shapes = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
        write_tensors(shapes, lambda name: pieces[name].make(), temporary)


def _write_config(folder: Path, target: Path) -> None:
    """The transformer's own, without what is said of the quantization."""
    described = read_json(folder / "config.json")
    described.pop("quantization_config")
    write_atomic(target / "config.json", json.dumps(described, indent=2, sort_keys=True) + "\n")


def export_all(checkpoint: Path, target: Path, layout: str, naming: str) -> None:
    """Whole or not at all."""
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
        if target.exists():
            raise ValueError(f"{target} is there already: choose another folder, or remove it")
        plain = [name for name, part in parts.items() if quantization_of(part) is None]
        plain = plain if len(plain) < len(parts) else []  # of which nothing could be exported
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for name, part in parts.items():
                if layout == "bf16" and name in plain:
                    shutil.copytree(part, partial / name)
                else:
                    export(part, partial / name, layout, naming, tick)
            if layout == "bf16":
                _copy_others(checkpoint, partial, parts)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _copy_others(checkpoint: Path, target: Path, parts: Collection[str]) -> None:
    for path in checkpoint.iterdir():
        if path.is_dir() and path.name not in parts:
            shutil.copytree(path, target / path.name)
        elif path.is_file():
            shutil.copy2(path, target / path.name)
