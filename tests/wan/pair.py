"""A pipeline of two transformers, as Wan2.2 has them, made of tiny-wan's blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from wanquant import load_pipeline
from wanquant.wan import tiny


def make_pair(folder: Path, first: Sequence[int], second: Sequence[int], ratio: float = 0.8) -> Path:
    """``first`` and ``second`` are the blocks of each; from ``ratio`` of the timesteps down the second denoises."""
    pipe = load_pipeline("tiny", device="cpu")
    blocks = list(pipe.transformer.blocks)
    for name, chosen in (("transformer", first), ("transformer_2", second)):
        pipe.transformer.blocks = torch.nn.ModuleList(blocks[index] for index in chosen)
        pipe.transformer.register_to_config(num_layers=len(chosen))
        pipe.transformer.save_pretrained(folder / name)
    for part in tiny.folder().iterdir():
        if part.is_dir() and part.name != "transformer":
            shutil.copytree(part, folder / part.name)
    shutil.copy(tiny.folder() / "generation.json", folder)
    index = json.loads((tiny.folder() / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": ratio}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
