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

import torch
from diffusers import WanTransformer3DModel

from wanquant import load_pipeline
from wanquant.qat.config import QATConfig, TrainConfig
from wanquant.qat.plan import plan_training
from wanquant.runs.run import read_result
from wanquant.wan.config import GenerationConfig
from wanquant.wan.resources.estimate import in_bytes, tokens_of

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.15
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


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
    for key, shapes in (("prompts", ["circle"]), ("calib", ["square"]), ("qat.data.prompts", ["circle", "triangle"])):
        color = "green" if key == "qat.data.prompts" else "red"
        texts = [f"a {color} {shape} moving up on a gray background" for shape in shapes]
        words.append(f"{key}.texts=[{','.join(texts)}]")
    return words


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
    memory, config = result["training"]["memory"], TrainConfig(qat=QATConfig(scope="all", batch=args.rows))
    config.model.generation = GenerationConfig(**result["generation"])
    tokens = tokens_of(config.model.generation, transformer)
    every = plan_training(transformer, config, tokens, 0, result["training"]["precision"]).added(True)
    taken = memory["peak"] - memory["begun"]
    parameters = sum(p.numel() for p in transformer.blocks[0].parameters())
    print(f"\n{args.blocks} blocks of {parameters / 1e6:.0f} million parameters, {args.rows} rows")
    print(f"block after block: training took {in_bytes(taken)}, planned were {in_bytes(memory['planned'])}", end="")
    print(f", ratio {taken / memory['planned']:.2f}; all at once the plan is {in_bytes(every)}")
    return int(abs(taken / memory["planned"] - 1) > BAR)


if __name__ == "__main__":
    sys.exit(main())
