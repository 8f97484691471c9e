"""A pipeline with a transformer of a true shape and random weights, where no pretrained one can be had.

    python -m benchmarks.random_wan <folder> [--shape 14b] [--blocks 40] [--dtype bf16] [--shard 2.0]

All that is not the transformer is tiny-wan's. Written a file at a time, each of at most ``--shard`` GB, in little more
memory than that. The same arguments give the same weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from wanquant.runs.progress import progress
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import INDEX
from wanquant.wan.checkpoints.tensor_files import file_names

#: Of Wan2.1's two models, from the ``config.json`` of each.
COMMON: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "14b": {**COMMON, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "1.3b": {**COMMON, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make(folder: Path, shape: str, blocks: int | None = None, dtype: str = "bf16", shard: float = 2.0) -> Path:
    """``FileExistsError`` if the folder is there."""
    size = {**SHAPES[shape], **({"num_layers": blocks} if blocks else {})}
    with torch.device("meta"):
        model = WanTransformer3DModel(**size)
    shutil.copytree(tiny.folder(), folder, ignore=lambda path, names: ["transformer"] if "transformer" in names else [])
    target = folder / "transformer"
    target.mkdir()
    model.save_config(target)
    files = list(_files(model, DTYPES[dtype], shard * 1e9))
    names, generator = file_names(len(files)), torch.Generator().manual_seed(0)
    with progress("write", len(files), "file") as tick:
        for name, shapes in zip(names, files, strict=True):
            tensors = {key: _draw(key, like, DTYPES[dtype], generator) for key, like in shapes.items()}
            save_file(tensors, target / name, metadata={"format": "pt"})
            tick()
    if len(files) > 1:
        where = {key: name for name, shapes in zip(names, files, strict=True) for key in shapes}
        total = sum(tensor.numel() for tensor in model.state_dict().values()) * DTYPES[dtype].itemsize
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    return folder


def _files(model: WanTransformer3DModel, dtype: torch.dtype, limit: float) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each file, on meta."""
    group: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if group and sum(t.numel() for t in (*group.values(), tensor)) * dtype.itemsize > limit:
            yield group
            group = {}
        group[name] = tensor
    yield group


def _draw(name: str, like: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Matrices of variance 1 / inputs, norms of ones, all else small."""
    if like.ndim == 1 and name.endswith("weight"):
        return torch.ones(like.shape, dtype=dtype)
    spread = 0.02 if like.ndim == 1 else like[0].numel() ** -0.5
    return torch.empty(like.shape, dtype=dtype).normal_(0, spread, generator=generator)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shard", type=float, default=2.0)
    args = parser.parse_args()
    make(args.folder, args.shape, args.blocks, args.dtype, args.shard)
    return 0


if __name__ == "__main__":
    sys.exit(main())
