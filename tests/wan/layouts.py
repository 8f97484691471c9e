"""A transformer written in the layouts that people have it in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from wanquant.wan.checkpoints.names import to_original

FP8_MAX = 448.0


def authors_config(transformer: WanTransformer3DModel) -> dict[str, Any]:
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    same = {key: config[key] for key in ("num_layers", "ffn_dim", "freq_dim", "text_dim")}
    described = {"_class_name": "WanModel", "model_type": "t2v", "dim": width, "num_heads": config.num_attention_heads}
    return {**described, **same, "in_dim": config.in_channels, "out_dim": config.out_channels}


def renamed(transformer: WanTransformer3DModel, prefix: str = "") -> dict[str, torch.Tensor]:
    """By the authors' names."""
    return {prefix + to_original(name): tensor.detach().clone() for name, tensor in transformer.state_dict().items()}


def write_folder(transformer: WanTransformer3DModel, folder: Path, described: Mapping[str, Any] | None) -> Path:
    """As the authors publish it, with the config that is given."""
    folder.mkdir(parents=True)
    save_file(renamed(transformer), folder / "diffusion_pytorch_model.safetensors")
    if described is not None:
        (folder / "config.json").write_text(json.dumps(described))
    return folder


def write_file(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    return path


def in_fp8(
    tensors: Mapping[str, torch.Tensor], rows: bool = False, ending: str = "scale_weight"
) -> dict[str, torch.Tensor]:
    """The blocks' linears in E4M3 with scales, one a tensor or one for each of its ``rows``, as in ComfyUI's files."""
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if not is_linear(name):
            found[name] = tensor
            continue
        wide, layer = tensor.float(), name.removesuffix(".weight")
        scale = (wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax()) / FP8_MAX
        found[name] = (wide / scale).to(torch.float8_e4m3fn)
        found[f"{layer}.{ending}"] = scale
        found[f"{layer}.{'scale_input' if ending == 'scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
    return found


def is_linear(name: str) -> bool:
    return "blocks." in name and name.endswith(".weight") and "norm" not in name


def of_fp8(tensors: Mapping[str, torch.Tensor], ending: str = "scale_weight") -> dict[str, torch.Tensor]:
    """What ``in_fp8`` has kept, by the definition, in BF16."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn and name != "scaled_fp8":
            scale = tensors[f"{name.removesuffix('.weight')}.{ending}"]
            found[name] = (tensor.float() * scale).bfloat16()
        elif name.split(".")[-1] not in ("scaled_fp8", ending, "scale_input", "input_scale"):
            found[name] = tensor
    return found
