"""What training block after block takes, beside what ``dry_run`` says of it, on blocks as wide as a model's.

    python -m benchmarks.blockwise_memory [--heads 40] [--ffn 13824] [--blocks 2] [--rows 8]

The defaults are Wan2.1-14B's width. A pipeline with random blocks of that width, and all else tiny-wan's, goes through
``train.py``, for one step of each block, in a process of its own, with an allocator that gives freed pages back
(glibc's keeps a third more in holes). What its memory rose by while it trained, and what was planned, are those of its
``result.json``; beside them, what the plan is for as many blocks all at once. Exits 1 if the plan is 15 % off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from wanquant import load_pipeline
from wanquant.evaluate.prompts import PromptsConfig
from wanquant.qat.config import DataConfig, QATConfig
from wanquant.qat.estimate import estimate_memory
from wanquant.qat.plan import resolve_train
from wanquant.qat.train_config import TrainConfig
from wanquant.runs.run import read_result
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.resources.printed import in_bytes

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.15
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

TEXTS = {
    "prompts": ["a red circle moving up on a gray background"],
    "calib": ["a red square moving up on a gray background"],
    "qat.data.prompts": [f"a green {shape} moving up on a gray background" for shape in ("circle", "triangle")],
}


def make(folder: Path, heads: int, ffn: int, blocks: int) -> WanTransformer3DModel:
    pipe = load_pipeline("tiny", device="cpu")
    size = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn, "num_layers": blocks}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer = WanTransformer3DModel.from_config({**pipe.transformer.config, **size}).bfloat16()
    pipe.save_pretrained(folder)
    return pipe.transformer


def asked(rows: int) -> list[str]:
    """Of ``train.py``: one step of each block, on as little else as there can be."""
    words = ["qat=on", "protect=none", "qat.steps=1", "qat.warmup=0", f"qat.batch={rows}", "tracker=none"]
    words += ["model.generation.steps=8", "model.batch=1", "prompts=own", "prompts.seeds=[0]"]
    words += ["eval.noise_floor=false", "checkpoint=false"]
    return words + [f"{key}.texts=[{','.join(texts)}]" for key, texts in TEXTS.items()]


def all_at_once(model: Path, result: dict[str, Any], rows: int) -> int:
    """Bytes that the plan of training every parameter adds."""
    measured, calibrated, learned = (PromptsConfig(texts=texts) for texts in TEXTS.values())
    precision, data = result["training"]["precision"], DataConfig(prompts=learned)
    qat = QATConfig(scope="all", batch=rows, precision=precision, data=data)
    source = ModelConfig(path=str(model), generation=GenerationConfig(**result["generation"]))
    plan = resolve_train(TrainConfig(model=source, prompts=measured, calib=calibrated, qat=qat))
    return estimate_memory(plan).added(True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model, run = Path(place, "model"), Path(place, "run")
        transformer = make(model, args.heads, args.ffn, args.blocks)
        words = [*asked(args.rows), f"model.path={model}", f"hydra.run.dir={run}", f"cache={place}/cache"]
        environment = {**os.environ, **GIVES_BACK}
        told = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, env=environment, check=False)
        if told.returncode:
            return told.returncode
        result = read_result(run)
        every = all_at_once(model, result, args.rows)
    memory = result["training"]["memory"]
    taken = memory["peak"] - memory["begun"]
    parameters = sum(p.numel() for p in transformer.blocks[0].parameters())
    print(f"\n{args.blocks} blocks of {parameters / 1e6:.0f} million parameters, {args.rows} rows")
    print(f"block after block: training took {in_bytes(taken)}, planned were {in_bytes(memory['planned'])}", end="")
    print(f", ratio {taken / memory['planned']:.2f}; all at once the plan is {in_bytes(every)}")
    return int(abs(taken / memory["planned"] - 1) > BAR)


if __name__ == "__main__":
    sys.exit(main())
