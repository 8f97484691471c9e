"""Our checkpoints in the layouts of other engines, from files to files, a tensor at a time.

``bf16`` is what the codes mean, as a plain BF16 model in diffusers' layout, for engines without the format: scales that
are no powers of two round each weight once more, and activations are not rounded any more. ``comfyui`` and
``compressed-tensors`` are told in ``layouts.fp8`` and, of NVFP4, ``layouts.nvfp4``; ``mindie-sd`` and ``modelslim`` in
``layouts.ascend``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from wanquant.runs.files import whole_folder
from wanquant.runs.progress import progress
from wanquant.wan.checkpoints.checkpoint import quantization_of, write_json
from wanquant.wan.checkpoints.find import transformers_of
from wanquant.wan.checkpoints.layouts import LAYOUTS, fp8, naming_of, nvfp4
from wanquant.wan.checkpoints.layouts.ascend import write_mindie, write_modelslim
from wanquant.wan.checkpoints.layouts.pieces import Checkpoint, Piece, write_as_source
from wanquant.wan.checkpoints.sums import check_sums, seal
from wanquant.wan.families import family_of

#: Channels of an attention head, as ComfyUI takes them to be in every Wan.
COMFYUI_HEADS = 128
#: Writes a checkpoint's tensors to a folder by a naming, and calls back after each file. It returns what is to be said.
Writer = Callable[[Checkpoint, Path, str, Callable[[], None]], list[str]]


def export_all(checkpoint: Path, target: Path, layout: str, naming: str | None = None) -> list[str]:
    """A whole quantized pipeline, its transformers one by one and the rest copied, or a transformer alone. What of it
    is not as the checkpoint has it, a line each."""
    naming = naming_of(layout, naming)
    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
    if (checkpoint / "checkpoint").is_dir():
        raise ValueError(f"{checkpoint} is a run: its checkpoint is {checkpoint / 'checkpoint'}")
    check_sums(checkpoint)
    parts, whole = transformers_of(checkpoint), LAYOUTS[layout].whole
    files = sum(len(list(part.glob("*.safetensors"))) for part in parts.values()) if whole else len(parts)
    with progress("export", files, "file") as tick:
        if "" in parts:
            return export(checkpoint, target, layout, naming, tick)
        _refuse_existing(target)
        plain = [name for name, part in parts.items() if quantization_of(part) is None]
        plain = plain if len(plain) < len(parts) else []  # of which nothing could be exported
        with whole_folder(target) as partial_target:
            said: list[str] = []
            for name, part in parts.items():
                if name not in plain:
                    said += export(part, partial_target / name, layout, naming, tick)
                elif whole:
                    shutil.copytree(part, partial_target / name)
                else:
                    said.append(f"{name} is not quantized, and was left out")
            for path in checkpoint.iterdir() if whole else ():
                if path.is_dir() and path.name not in parts:
                    shutil.copytree(path, partial_target / path.name)
                elif path.is_file():
                    shutil.copy2(path, partial_target / path.name)
            if whole:
                seal(partial_target)  # not those of the source
        return list(dict.fromkeys(said))


def export(
    folder: Path, target: Path, layout: str, naming: str | None = None, on_file: Callable[[], None] = lambda: None
) -> list[str]:
    """Writes the transformer in ``folder`` to ``target``, which must not be there. ``on_file`` is called after each
    file."""
    naming = naming_of(layout, naming)
    checkpoint = Checkpoint.of(folder)
    kind = str(checkpoint.config.get("_class_name"))
    if layout != "bf16" and not family_of(kind).is_wan:
        raise ValueError(f"{folder} is a {kind}: {layout} is a layout for Wan's transformers, bf16 is for any")
    if layout != "bf16" and checkpoint.scheme.act_steps > 1:
        told = f"layout {layout} has one scale for all denoising steps"
        raise ValueError(f"quant.activations.steps={checkpoint.scheme.act_steps}: {told}, bf16 is for any")
    _refuse_existing(target)
    with whole_folder(target) as partial_target:
        write_json(partial_target / "config.json", checkpoint.config)
        writers = WRITERS | (NVFP4 if checkpoint.scheme.format.name == "nvfp4" else {})
        said = writers[layout](checkpoint, partial_target, naming, on_file)
    if layout == "comfyui" and (width := checkpoint.config["attention_head_dim"]) != COMFYUI_HEADS:
        told = f"ComfyUI takes heads to be {COMFYUI_HEADS} wide, as all published Wans have them"
        said.append(f"{told}: these are {width}")
    return said


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} is there already: choose another folder, or remove it")


def _write_bf16(checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]) -> list[str]:
    def parts(name: str) -> dict[str, Piece]:
        make = partial(checkpoint.plain_weight, name)
        return {"weight": Piece("FLOAT", torch.bfloat16, checkpoint.shape(name), make), **checkpoint.bias(name)}

    write_as_source(checkpoint, target, parts, on_file)
    return []


WRITERS: dict[str, Writer] = {
    "bf16": _write_bf16,
    "comfyui": fp8.write_comfyui,
    "compressed-tensors": fp8.write_compressed_tensors,
    "modelslim": write_modelslim,
    "mindie-sd": write_mindie,
}
#: In their place, of a checkpoint in NVFP4.
NVFP4: dict[str, Writer] = {"comfyui": nvfp4.write_comfyui, "compressed-tensors": nvfp4.write_compressed_tensors}
