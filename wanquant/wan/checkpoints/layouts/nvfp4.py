"""NVFP4 layouts. A checkpoint of ours has in each row the codes of its elements, the first of two in the low four bits,
and behind them an E4M3 for every 16; and a float32 scale of the tensor. Others have the same numbers in other places.

``comfyui``             one file by the authors' names, as ComfyUI loads it and comfy-kitchen keeps it (its
                        ``TensorCoreNVFP4Layout``): ``<linear>.weight`` uint8 [out, in / 2], the first of two elements
                        in the *high* four bits; ``weight_scale`` F8_E4M3, filled up to [128 m, 4 n] and in the order in
                        which cards read it; ``weight_scale_2`` float32 [], and ``input_scale`` where that is static;
                        ``comfy_quant``, JSON in bytes.
``compressed-tensors``  diffusers' files, format ``nvfp4-pack-quantized`` (vLLM reads it): ``<linear>.weight_packed``
                        uint8 [out, in / 2], ``weight_scale`` F8_E4M3 [out, in / 16], and float32 [1]
                        ``weight_global_scale`` and ``input_global_scale``, which divide: they are 1 over our scales.

Every number is the checkpoint's own, but 1 / scale, which is rounded to float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanquant.quant.block_codes import in_tiles
from wanquant.quant.scale import PerTensor
from wanquant.quant.scheme import Scheme
from wanquant.wan.checkpoints.checkpoint import write_json
from wanquant.wan.checkpoints.layouts.fp8 import compressed_config
from wanquant.wan.checkpoints.layouts.pieces import RENAME, Checkpoint, Piece, write, write_as_source

E4M3, BLOCK = torch.float8_e4m3fn, 16
JOINED = (
    "vLLM joins q, k and v of self-attention and takes the largest weight_global_scale for all three, so that two come "
    "out smaller there than they are: protect attn1.to_q, to_k and to_v for it"
)
#: Of features out of a linear: ComfyUI's products are of multiples of it.
MULTIPLE = 16


def write_comfyui(checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]) -> list[str]:
    scheme, rename = checkpoint.scheme, RENAME[naming]
    _refuse(checkpoint, "layout comfyui")
    told: dict[str, Any] = {"format": "nvfp4"}
    if scheme.act_format.name != "nvfp4":
        told["full_precision_matrix_mult"] = True
    marker = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    pieces = {rename(name): checkpoint.as_it_is(name) for name in checkpoint.others()}
    for name in checkpoint.linears:
        rows, columns = checkpoint.shape(name)
        if rows % MULTIPLE:
            raise ValueError(f"layout comfyui: {name} has {rows} features out, no multiple of {MULTIPLE}")
        tiles = (_up(rows, 128), _up(columns // BLOCK, 4))
        parts = {
            "weight": Piece("", torch.uint8, (rows, columns // 2), partial(_high_first, checkpoint, name)),
            "weight_scale": Piece("", E4M3, tiles, partial(_tiles, checkpoint, name, tiles)),
            "weight_scale_2": checkpoint.as_it_is(f"{name}.weight_scale"),
            "comfy_quant": Piece("", torch.uint8, tuple(marker.shape), lambda: marker),
        }
        if scheme.act_static and scheme.act_format.name == "nvfp4":
            parts["input_scale"] = checkpoint.as_it_is(f"{name}.input_scale")
        pieces |= {f"{rename(name)}.{part}": piece for part, piece in (parts | checkpoint.bias(name)).items()}
    write(pieces, target / "nvfp4.safetensors")
    on_file()
    return _remarks(scheme)


def write_compressed_tensors(
    checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]
) -> list[str]:
    scheme, read = checkpoint.scheme, checkpoint.source.read
    _refuse(checkpoint, "layout compressed-tensors")
    rounds = scheme.act_format.name == "nvfp4"
    if rounds and not scheme.act_static:
        raise ValueError("layout compressed-tensors has a static scale of inputs: quantize with quant=nvfp4_w4a4")

    def parts(name: str) -> dict[str, Piece]:
        rows, columns = checkpoint.shape(name)
        elements, scales = (partial(_halves, checkpoint, name, part) for part in range(2))
        made = {"weight_packed": Piece("", torch.uint8, (rows, columns // 2), elements)}
        made["weight_scale"] = Piece("", E4M3, (rows, columns // BLOCK), lambda: scales().view(E4M3))
        for side in ("weight", "input") if rounds else ("weight",):
            made[f"{side}_global_scale"] = Piece("", torch.float32, (1,), partial(_inverse, read, f"{name}.{side}"))
        return made | checkpoint.bias(name)

    write_as_source(checkpoint, target, parts, on_file)
    how = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": BLOCK}
    how["scale_dtype"] = str(E4M3)
    group = {"targets": ["Linear"], "weights": {**how, "dynamic": False}}
    if rounds:
        group["input_activations"] = {**how, "dynamic": "local"}
    config = {**checkpoint.config, "quantization_config": compressed_config(checkpoint, "nvfp4-pack-quantized", group)}
    write_json(target / "config.json", config)
    return [*([JOINED] if any(name.endswith(".to_q") for name in checkpoint.linears) else []), *_remarks(scheme)]


def _refuse(checkpoint: Checkpoint, layout: str) -> None:
    checkpoint.refuse_factors(layout)
    if not isinstance(checkpoint.scheme.weight_granularity, PerTensor):
        raise ValueError(f"quant.weights.granularity=per_channel: {layout} has one scale a weight, choose per_tensor")


def _remarks(scheme: Scheme) -> list[str]:
    """What is not as the checkpoint has it."""
    said, name, rule = [], scheme.act_format.name, scheme.config.activations.rule
    if name not in ("nvfp4", "bf16"):
        said.append(f"inputs are not rounded there, where here they are {name}")
    own = isinstance(scheme.act_granularity, PerTensor) and rule == scheme.act_format.default_rule()
    if name == "nvfp4" and not (scheme.act_static or own):
        said.append("inputs are rounded there by one scale for all, of their largest magnitude; here otherwise")
    if scheme.attention != "off":
        said.append(f"attention is not quantized there (quant.attention={scheme.attention} here)")
    return said


def _halves(checkpoint: Checkpoint, name: str, part: int) -> torch.Tensor:
    """The codes of elements, or the bytes of the blocks' scales, contiguous."""
    _, columns = checkpoint.shape(name)
    codes = checkpoint.source.read(f"{name}.weight")
    halves: tuple[torch.Tensor, ...] = codes.split([columns // 2, columns // BLOCK], dim=1)
    return halves[part].contiguous()


def _high_first(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    codes = _halves(checkpoint, name, 0)
    return (codes << 4).bitwise_or_(codes >> 4)


def _tiles(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> torch.Tensor:
    return in_tiles(_halves(checkpoint, name, 1), E4M3).view(shape)


def _inverse(read: Callable[[str], torch.Tensor], side: str) -> torch.Tensor:
    return (1 / read(f"{side}_scale"))[None]


def _up(count: int, to: int) -> int:
    return -(-count // to) * to
