"""A training step of the quantized model beside one of the BF16 model: time and memory.

    python -m benchmarks.training_step [--rows 16] [--threads 2]

tiny-wan, every parameter trained (``qat.scope=all``), float32 master weights, BF16 products, AdamW. Times are taken in
turn in one process; memory in two processes of their own, as what their peak rose by from a loaded pipeline to the end
of the second step, with an allocator that gives freed pages back (glibc's keeps a third more in holes). Prints also
what ``dry_run`` would have predicted. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import Row, compare, table
from wanquant import load_pipeline
from wanquant.evaluate.prompts import PromptsConfig
from wanquant.qat.config import DataConfig, QATConfig
from wanquant.qat.estimate import TrainingMemory, estimate_memory
from wanquant.qat.plan import resolve_train
from wanquant.qat.train_config import TrainConfig
from wanquant.quant.convert import make_trainable_
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.device import forget_peak_memory, peak_memory
from wanquant.wan.resources.footprint import mixed_norms
from wanquant.wan.resources.printed import in_bytes

TIME_BAR, MEMORY_BAR = 1.4, 1.2
CPU = torch.device("cpu")


def make_step(transformer: Any, rows: int, quantize: bool) -> Callable[[], None]:
    """Of one training step, of a model of its own."""
    model = copy.deepcopy(transformer)
    if quantize:
        make_trainable_(model)
    model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    noisy, text = torch.randn(rows, 16, 5, 8, 8), torch.randn(rows, 64, 128)
    timestep, target = 1000 * torch.rand(rows), torch.randn(rows, 16, 5, 8, 8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16), mixed_norms():
            velocity = model(noisy, timestep, text, return_dict=False)[0]
        F.mse_loss(velocity.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def estimated(rows: int, quantize: bool) -> TrainingMemory:
    """Of such steps of tiny-wan."""
    texts = [f"a {color} circle moving up on a gray background" for color in ("red", "green", "blue")]
    measured, calibrated, learned = (PromptsConfig(texts=[text]) for text in texts)
    data = DataConfig(prompts=learned)
    qat = QATConfig(scope="all", quantize=quantize, batch=rows, precision="bf16", data=data)
    model = ModelConfig(generation=GenerationConfig(64, 64, 17, 8, 1.0, 3.0, 64, 8))
    return estimate_memory(resolve_train(TrainConfig(model=model, prompts=measured, calib=calibrated, qat=qat)))


def rise(rows: int, quantize: bool, threads: int) -> int:
    """Bytes by which two steps raise the peak."""
    torch.set_num_threads(threads)
    transformer = load_pipeline("tiny", device="cpu").transformer
    forget_peak_memory(CPU)
    before = peak_memory(CPU)
    step = make_step(transformer, rows, quantize)
    step(), step()
    return peak_memory(CPU) - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformer = load_pipeline("tiny", device="cpu").transformer
    ours, theirs = (make_step(transformer, args.rows, quantize) for quantize in (True, False))
    rows = [compare(f"step, {args.rows} rows", ours, "BF16 step", theirs, TIME_BAR, args.rounds)]
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [pool.apply(rise, (args.rows, quantize, args.threads)) for quantize in (True, False)]
    rows.append(Row(f"memory, {args.rows} rows", "BF16 step", *peaks, MEMORY_BAR))
    print(table(rows))
    for quantize, peak in zip((True, False), peaks, strict=True):
        own = estimated(args.rows, quantize).total - 2 * sum(
            p.numel() for p in transformer.parameters()
        )  # the model as it was is loaded before
        print(f"{'QAT' if quantize else 'BF16'}: rose by {in_bytes(peak)}, planned {in_bytes(own)}")
    return int(any(row.verdict == "MISSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
