"""The true shape: a checkpoint of random weights is converted from files to files, and what comes out is run.

    python -m benchmarks.real_size <folder> [--shape 14b] [--blocks 40] [--threads 2] [--write]

``<folder>``, which must not be there, takes the checkpoint (28 GB at 14b) and the result (17 GB) and is removed at the
end. Beside the conversion, ``cp`` of the same files, which is made to wait for the disk as the conversion is, and whose
copies are removed as it goes; both read from the disk. Beside the forward pass, 17 frames of 128x128, the time its
matrix products alone would take. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.random_wan import SHAPES, make
from benchmarks.timing import Row, table
from wanquant.quant.scheme import parse
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.checkpoint import config_of, quantization_of, quantized_linears
from wanquant.wan.checkpoints.find import shape_of
from wanquant.wan.config import GenerationConfig
from wanquant.wan.device import forget_peak_memory, peak_memory, resident_memory
from wanquant.wan.load import read_transformer
from wanquant.wan.resources.empty import USUAL, Quantized, tokens_of
from wanquant.wan.resources.footprint import denoising_bytes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
VIDEO = GenerationConfig(128, 128, 17, 1, 1.0, 3.0, 512)
#: Bytes of memory, and times ``cp``, that a conversion may take; share of the input that may come out; bytes that a
#: forward pass may take; by how much a prediction may be off.
PEAK, TIMES, SHARE, RUNS_IN, OFF = 3e9, 3.0, 0.60, 20e9, 0.15


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget(paths: Sequence[Path]) -> None:
    """Out of the page cache, so that who reads them next reads the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Of ``cp`` and the disk, by as many files at a time as there is room for beside them."""
    forget(files_of(source))
    room, seconds = 0.5 * shutil.disk_usage(target.parent).free, 0.0
    waiting = files_of(source)
    while waiting:
        taken = [waiting.pop(0)]
        while waiting and sum(path.stat().st_size for path in [*taken, waiting[0]]) < room:
            taken.append(waiting.pop(0))
        target.mkdir()
        begun = time.perf_counter()
        subprocess.run(["cp", "--reflink=never", *map(str, taken), str(target)], check=True)
        os.sync()
        seconds += time.perf_counter() - begun
        shutil.rmtree(target)
    return seconds


def convert(model: Path, target: Path, work: Path, threads: int) -> tuple[dict[str, Any], float, float]:
    """Its result, seconds of converting until all is on the disk, and of the whole program with its imports."""
    forget(files_of(model))
    words = ["mode=convert", f"model.path={model}", f"convert.to={target}", f"threads={threads}", "tracker=none"]
    words += [f"cache={work / 'cache'}", f"hydra.run.dir={work / 'run'}"]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "ptq.py", *words], cwd=ROOT, check=True)
    ended = time.perf_counter()
    os.sync()
    waited, result = time.perf_counter() - ended, read_result(work / "run")
    return result, result["timings"]["convert"] + waited, ended - begun + waited


def run(folder: Path, threads: int) -> dict[str, float]:
    """One forward pass of the packed transformer in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.real_size", str(folder), "--forward", "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def forward(folder: Path) -> dict[str, float]:
    """Load and run, and what both were predicted to take."""
    shape, described = shape_of(folder), quantization_of(folder)
    assert described is not None
    names = [name.split(".", 2)[2] for name in described["modules"]]
    how = Quantized(list(dict.fromkeys(names)), parse(config_of(described)))
    activations = denoising_bytes(dict(shape.config), how, VIDEO, 1, CPU)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tokens, width, ffn = tokens_of(VIDEO, shape), shape.proj_out.in_features, shape.config.ffn_dim
    linear = sum(m.in_features * m.out_features for m in shape.modules() if isinstance(m, torch.nn.Linear))
    flops = 2 * tokens * linear + 4 * tokens**2 * width * len(shape.blocks)
    floor = flops / rate(tokens, width, ffn)
    forget_peak_memory(CPU)
    planned = resident_memory(CPU) + stored + activations
    begun = time.perf_counter()
    transformer = read_transformer(folder)
    assert all(layer.is_packed for layer in quantized_linears(transformer).values())
    loaded = time.perf_counter() - begun
    noise = torch.randn(1, 16, *USUAL.latents(VIDEO), generator=torch.Generator().manual_seed(0)).bfloat16()
    text = torch.zeros(1, VIDEO.max_text_length, shape.config.text_dim, dtype=torch.bfloat16)
    seconds = []
    for _ in range(2):  # the first brings the weights from the disk
        begun = time.perf_counter()
        output = transformer(noise, torch.tensor([500.0]), text, return_dict=False)[0]
        seconds.append(time.perf_counter() - begun)
    assert output.isfinite().all()
    told = {"planned": planned, "peak": peak_memory(CPU), "loading": loaded, "floor": floor}
    return {**told, "first": seconds[0], "second": seconds[1]}


def rate(tokens: int, width: int, ffn: int) -> float:
    """FLOPs a second of the model's largest product, in BF16."""
    a, b = torch.randn(tokens, width).bfloat16(), torch.randn(ffn, width).bfloat16()
    F.linear(a, b)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 1:
        F.linear(a, b)
        count += 1
    return 2 * tokens * width * ffn * count / (time.perf_counter() - begun)


def measure(work: Path, shape: str, blocks: int | None, threads: int) -> list[Row]:
    model, target = make(work / "model", shape, blocks), work / "converted"
    copied = copy_seconds(model / "transformer", work / "copy")
    result, seconds, whole = convert(model, target, work, threads)
    found = run(target / "transformer", threads)
    memory, told = result["memory"], result["convert"]
    off = [abs(plan - peak) / peak for plan, peak in _planned(memory, found)]
    return [
        Row("convert, peak memory", "3 GB", memory["peak_bytes"], PEAK, 1.0),
        Row("convert, until it is on the disk", "cp", seconds, copied, TIMES),
        Row("the whole program, with its imports", "cp", whole, copied),
        Row("convert, bytes written", "read", told["written_bytes"], told["read_bytes"], SHARE),
        Row("convert, predicted peak", "measured", memory["planned_bytes"], memory["peak_bytes"]),
        Row("convert, predicted time", "measured", told["planned_seconds"], result["timings"]["convert"]),
        Row("forward from packed weights, peak memory", "20 GB", found["peak"], RUNS_IN, 1.0),
        Row("forward, predicted peak", "measured", found["planned"], found["peak"]),
        Row("loading", "convert", found["loading"], seconds),
        Row("forward, first", "its BF16 products", found["first"], found["floor"]),
        Row("forward, second", "its BF16 products", found["second"], found["floor"]),
        Row("predicted peaks, off by at most", "measured", max(off), 1.0, OFF, plain=True),
    ]


def _planned(memory: dict[str, Any], found: dict[str, float]) -> list[tuple[float, float]]:
    return [(memory["planned_bytes"], memory["peak_bytes"]), (found["planned"], found["peak"])]


def cpu_name() -> str:
    """As Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.forward:
        print(json.dumps(forward(args.folder)))
        return 0
    args.folder.mkdir(parents=True)  # refused if it is there: it will be removed
    try:
        rows = measure(args.folder.resolve(), args.shape, args.blocks, args.threads)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    blocks = f", {args.blocks} blocks" if args.blocks else ""
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {args.threads} threads"
    words = ["<folder>" if word == str(args.folder) else word for word in sys.argv[1:]]
    command = " ".join(["python -m benchmarks.real_size", *words])
    page = f"# {args.shape}{blocks}, from files to files\n\n`{command}`\n\n"
    page += f"{table(rows)}\n\n{machine}; torch {torch.__version__}\n"
    print(page)
    if args.write:
        stem = f"{datetime.now():%Y-%m-%d-%H%M}-real-size-{args.shape}.md"
        (ROOT / "benchmarks" / "results" / stem).write_text(page, encoding="utf-8")
    return 1 if any(row.verdict == "MISSED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
