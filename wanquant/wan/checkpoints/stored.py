"""Tensors where they lie in files, found by the files' headers and read one at a time: safetensors, FP8 with scales
beside it (as ComfyUI's files have it), and GGUF.

FP8: the weight ``<name>.weight`` is float8, its value ``weight · scale`` with the scale in ``<name>.scale_weight``
(``<name>.weight_scale`` in newer files), one for the tensor or one for each row. Scales of inputs and markers
(``scaled_fp8``, ``<name>.comfy_quant``) are for engines that multiply in FP8, and nothing here needs them.

GGUF needs the package ``gguf``, which says where the blocks of a tensor lie and what they mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

#: Types of numbers by their names in a file; first those that a model to be quantized may have.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
TYPES = {**PLAIN, **FP8, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32}
#: Endings of what belongs to an FP8 weight.
SCALES, BESIDE = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
#: Where ComfyUI's GGUF files have the shape of a tensor that was reshaped to fit its blocks.
GGUF_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, from which byte on and how many, its type and shape. What is not plain: FP8
    has a ``scale``, unless it was only cast; GGUF's blocks have the name of their type as ``blocks``."""

    path: Path
    name: str
    first: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: Stored | None = None
    blocks: str = ""

    @property
    def kind(self) -> str:
        """What it is made of; nothing of plain numbers."""
        if self.blocks:
            return f"GGUF {self.blocks}"
        scaled = " with scales" if self.scale else ""
        return f"{str(self.dtype).removeprefix('torch.')}{scaled}" if self.dtype in FP8.values() else ""

    @property
    def held(self) -> int:
        """Bytes of memory while it is read: of what is not plain also its values in float32."""
        return self.size + (4 * math.prod(self.shape) if self.kind else 0)

    def read(self) -> torch.Tensor:
        """In the type it is stored in; what is not plain as its values in float32. Not mapped: what was read would stay
        in memory with the map."""
        data = torch.empty(self.size, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.first)
            if file.readinto(data.numpy().data) != self.size:
                raise ValueError(f"{self.path} ends within tensor {self.name}")
        if self.blocks:
            return _from_blocks(data, self.blocks).view(self.shape)
        tensor = data.view(self.dtype).view(self.shape)
        if not self.kind:
            return tensor
        values = tensor.float()
        if self.scale is not None:
            scale = self.scale.read().float()
            values *= scale.reshape(-1, *[1] * (values.dim() - 1)) if scale.numel() > 1 else scale.reshape(())
        return values


def stored_in(path: Path, known: Collection[str]) -> dict[str, Stored]:
    """The tensors of a file by their names there, by its header alone; ``ValueError`` for another than the ``known``
    types, and for a file that is not there or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete")
    return _in_gguf(path) if path.suffix == ".gguf" else _in_safetensors(path, known)


def _in_safetensors(path: Path, known: Collection[str]) -> dict[str, Stored]:
    header, begin = _header(path)
    found: dict[str, Stored] = {}
    for name, told in header.items():
        kinds = TYPES if _is_beside(name) else known
        if told["dtype"] not in kinds:
            raise ValueError(f"{path}: tensor {name} is {told['dtype']}, not one of {', '.join(kinds)}")
        first, end = told["data_offsets"]
        stored = Stored(path, name, begin + first, end - first, TYPES[told["dtype"]], tuple(told["shape"]))
        if stored.size != math.prod(stored.shape) * stored.dtype.itemsize:
            raise ValueError(f"{path} is truncated or damaged: tensor {name} has {stored.size} bytes")
        found[name] = stored
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file, and where its tensors begin. The library would map the file, which the system may refuse
    for one that is larger than the memory."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(begin - 8) if begin <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = begin + max((told["data_offsets"][1] for told in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is truncated or damaged: it has no whole header") from None
    if end != size:
        raise ValueError(f"{path} is truncated or damaged: it has {size} bytes, and its header tells of {end}")
    return header, begin


def _is_beside(name: str) -> bool:
    return name.endswith(BESIDE) or name.split(".")[-1] == MARKER


def with_scales(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """With each FP8 weight's scale in it, and without what stands beside. ``ValueError`` for a weight without a scale
    where others have theirs, and for a scale of blocks."""
    found = {name: tensor for name, tensor in tensors.items() if name.split(".")[-1] != MARKER}
    scaled = len(found) < len(tensors)
    for name in tensors:
        ending = next((each for each in (*SCALES, *BESIDE) if name.endswith(each)), None)
        weight = found.get(f"{name.removesuffix(ending)}.weight") if ending else None
        if weight is None or weight.dtype not in FP8.values():
            continue
        scale, scaled = found.pop(name), True
        if ending in SCALES:
            _check_scale(scale, weight)
            found[weight.name] = replace(weight, scale=scale)
    bare = [t for t in found.values() if t.dtype in FP8.values() and t.scale is None and len(t.shape) == 2]
    if scaled and bare:
        name = min(tensor.name for tensor in bare).removesuffix(".weight")
        raise ValueError(f"{bare[0].path}: tensor {name}{SCALES[0]} is missing ({len(bare)} in all)")
    return found


def _check_scale(scale: Stored, weight: Stored) -> None:
    if scale.dtype not in PLAIN.values() or math.prod(scale.shape) not in (1, weight.shape[0]):
        raise ValueError(
            f"{scale.path}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}: only one for the weight "
            f"or for each of its rows is read"
        )


def _gguf() -> Any:
    try:
        return import_module("gguf")
    except ImportError:
        raise ValueError("to read GGUF files the package gguf is needed: pip install 'wanquant[gguf]'") from None


def _in_gguf(path: Path) -> dict[str, Stored]:
    gguf, found = _gguf(), {}
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    for tensor in reader.tensors:
        was = reader.get_field(GGUF_SHAPE + tensor.name)
        shape = was.contents() if was is not None else reversed(tensor.shape.tolist())
        place = int(tensor.data_offset), int(tensor.n_bytes)
        kind = tensor.tensor_type.name
        how = (PLAIN[kind], tuple(shape)) if kind in PLAIN else (torch.float32, tuple(shape), None, kind)
        found[tensor.name] = Stored(path, tensor.name, *place, *how)
    for kind in {stored.blocks for stored in found.values()} - {""}:
        _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        _from_blocks(torch.zeros(size, dtype=torch.uint8), kind)  # refused before anything is read
    return found


def _from_blocks(data: torch.Tensor, kind: str) -> torch.Tensor:
    """``ValueError`` for a type that the package cannot read."""
    gguf = _gguf()
    try:
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    except NotImplementedError as error:
        raise ValueError(f"GGUF's type {kind}: {error}") from None
