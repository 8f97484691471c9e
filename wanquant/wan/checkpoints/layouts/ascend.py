"""The layouts of Ascend's engines: types of tensors in a ``quant_model_description``, as msModelSlim writes it.

    W8A8_DYNAMIC   INT8, a scale a row, dynamic activations     weight, weight_scale [out, 1], weight_offset, bias
    W8A8           INT8, a scale a row, static activations      weight, input_scale, input_offset, deq_scale, quant_bias
    W8A8_MXFP8     MXFP8                                        weight, weight_scale (exponents + 127), bias
    W8A8_HIFLOAT8  HiF8, as W8A8_DYNAMIC, with codes in uint8   MindIE-SD has no type of that name

``mindie-sd``  ``quant_model_description_<type>.json`` and one ``quant_model_weight_<type>.safetensors``, as MindIE-SD
               reads them (its ``quantize.py``, ``layer.py``), by diffusers' or the authors' names. Where smoothing has
               left factors they are ``<linear>.div.mul_scale``, and the linear is ``<linear>.linear``.
``modelslim``  ``quant_model_description.json`` beside diffusers' own files and names, as sglang reads them (what its
               ``wan_repack.py`` makes of the other); static linears have ``weight_scale`` and ``weight_offset`` too.

None of these engines runs without its card, so what they do with it has not been seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from wanquant.quant.scheme import Scheme
from wanquant.runs.files import write_atomic
from wanquant.wan.checkpoints.layouts.pieces import RENAME, Checkpoint, Piece, write, write_as_source

#: In which type the codes are kept.
CODES = {"W8A8_MXFP8": torch.float8_e4m3fn, "W8A8_HIFLOAT8": torch.uint8}


def write_mindie(checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]) -> list[str]:
    """In one file of weights: MindIE-SD takes no more."""
    kind, rename = _type_of(checkpoint.scheme, "mindie-sd"), RENAME[naming]
    checkpoint.refuse_others("layout mindie-sd")
    pieces = {rename(name): checkpoint.as_it_is(name) for name in checkpoint.others()}
    for name in checkpoint.linears:
        own = rename(name)
        if checkpoint.has(f"{name}.input_factor"):
            # By which the engine multiplies the input; the linear is then looked for one name deeper.
            pieces[f"{own}.div.mul_scale"] = checkpoint.as_it_is(f"{name}.input_factor")
            own = f"{own}.linear"
        pieces |= {f"{own}.{part}": piece for part, piece in _linear(checkpoint, name, kind).items()}
    write(pieces, target / f"quant_model_weight_{kind.lower()}.safetensors")
    on_file()
    _describe(kind, pieces, target / f"quant_model_description_{kind.lower()}.json")
    remarks = ["transformers alone: VAE, text encoder and configs are the original's"]
    if kind == "W8A8_HIFLOAT8":
        remarks.append("no engine is known to read W8A8_HIFLOAT8: MindIE-SD refuses it as a type it does not have")
    return remarks


def write_modelslim(checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]) -> list[str]:
    kind = _type_of(checkpoint.scheme, "modelslim")
    checkpoint.refuse_factors("layout modelslim")

    def parts(name: str) -> dict[str, Piece]:
        return _linear(checkpoint, name, kind) | (_row_scales(checkpoint, name, kind) if kind == "W8A8" else {})

    written = write_as_source(checkpoint, target, parts, on_file)
    _describe(kind, written, target / "quant_model_description.json")
    return []


def _describe(kind: str, pieces: Mapping[str, Piece], path: Path) -> None:
    told = {"model_quant_type": kind, "version": "1.0.0"}
    told |= {name: piece.kind for name, piece in sorted(pieces.items())}
    write_atomic(path, json.dumps(told, indent=2) + "\n")


def _type_of(scheme: Scheme, layout: str) -> str:
    if scheme.attention != "off":
        raise ValueError(f"quant.attention={scheme.attention}: Ascend's engines quantize attention in other ways")
    name, static = scheme.format.name, scheme.act_static
    if name != scheme.act_format.name:
        raise ValueError(f"layout {layout} has no {name} weights for inputs of {scheme.act_format.name}")
    if name == "int8":
        return "W8A8" if static else "W8A8_DYNAMIC"
    known = {"mxfp8": "W8A8_MXFP8"} | ({"hif8": "W8A8_HIFLOAT8"} if layout == "mindie-sd" else {})
    if name not in known or static:
        found = f"static {name}" if static else name
        raise ValueError(f"layout {layout} has no {found}: it has int8, and with dynamic inputs {' and '.join(known)}")
    rules = {scheme.config.weights.rule, scheme.config.activations.rule}
    if scheme.format.block and rules != {"direct"}:
        raise ValueError(f"layout {layout} has no scale outside of the blocks: choose quant.weights.rule=direct")
    return known[name]


def _linear(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Piece]:
    """Its tensors, by what the layout calls them."""
    source, (rows, columns) = checkpoint.source, checkpoint.shape(name)
    biased, codes, float32 = checkpoint.has(f"{name}.bias"), CODES.get(kind, torch.int8), torch.float32

    def read(part: str) -> torch.Tensor:
        return source.read(f"{name}.{part}")

    def output_scales() -> torch.Tensor:
        return read("weight_scale").expand(rows) * read("input_scale")

    def bias_in_steps() -> torch.Tensor:
        bias = read("bias").float() if biased else torch.zeros(rows)
        return (bias / output_scales()).round().to(torch.int32)

    pieces = {"bias": Piece("FLOAT", float32, (rows,), lambda: read("bias").float())} if biased else {}
    pieces["weight"] = Piece(kind, codes, (rows, columns), lambda: read("weight")[:, :columns].contiguous().view(codes))
    if kind == "W8A8_MXFP8":  # the bytes behind the codes
        shape = rows, columns // checkpoint.scheme.format.block
        pieces["weight_scale"] = Piece(kind, torch.uint8, shape, lambda: read("weight")[:, columns:].contiguous())
    elif kind == "W8A8":
        pieces["input_scale"] = Piece(kind, float32, (1,), lambda: read("input_scale")[None])
        pieces["input_offset"] = Piece(kind, float32, (1,), lambda: torch.zeros(1))
        pieces["deq_scale"] = Piece(kind, float32, (rows,), output_scales)
        pieces["quant_bias"] = Piece(kind, torch.int32, (rows,), bias_in_steps)
    else:
        pieces |= _row_scales(checkpoint, name, kind)
    return pieces


def _row_scales(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Piece]:
    rows = checkpoint.shape(name)[0]

    def scales() -> torch.Tensor:
        return checkpoint.source.read(f"{name}.weight_scale").expand(rows)[:, None]

    return {
        "weight_scale": Piece(kind, torch.float32, (rows, 1), scales),
        "weight_offset": Piece(kind, torch.float32, (rows, 1), lambda: torch.zeros(rows, 1)),
    }
