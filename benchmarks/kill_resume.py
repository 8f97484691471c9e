"""A sweep killed again and again ends with the numbers of one that was not.

    python -m benchmarks.kill_resume [--kills 10] [--jobs 8]

Two sweeps of small jobs on tiny-wan, each with a cache of its own: one runs through, the other, with all its
processes, gets SIGKILL at random moments and is started again. Prints what each of its lives saw, and whether the
results are the same to the last bit. Exits 1 if they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What is compared: everything but times, memory, and what came from the cache.
NUMBERS = ("signature", "metrics", "gates", "verdict", "overflow", "conversion", "calibration", "protect", "quant")
PRESETS = ("none", "entry", "exit", "boundary", "ends", "first5", "middle", "random")


def command(folder: Path, jobs: int) -> list[str]:
    overrides = [f"protect={','.join(PRESETS[:jobs])}", "prompts.seeds=[1,2]", "model.batch=4", "tracker=none"]
    overrides += ["model.generation.steps=4", f"cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    return [sys.executable, "ptq.py", "-m", *overrides]


def live(folder: Path, jobs: int, seconds: float | None) -> int | None:
    """One life of the sweep, cut after so many seconds; its exit status, or None if it was killed."""
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen(
            command(folder, jobs), cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def numbers(folder: Path, jobs: int) -> list[dict[str, Any]]:
    results = [json.loads((folder / "sweep" / str(job) / "result.json").read_text()) for job in range(jobs)]
    return [{key: result[key] for key in NUMBERS} for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=len(PRESETS), choices=range(1, len(PRESETS) + 1))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wanquant-kill-") as scratch:
        whole, cut = Path(scratch) / "whole", Path(scratch) / "cut"
        for folder in (whole, cut):
            folder.mkdir()
        begun = time.perf_counter()
        status = live(whole, args.jobs, None)
        length = time.perf_counter() - begun
        print(f"not killed: status {status}, {length:.0f} s", flush=True)
        draw, lives = random.Random(args.seed), 0
        while lives < args.kills:
            # So that about all of them fall before its end.
            seconds = draw.uniform(0.2, 2.0) * length / args.kills + draw.uniform(0, 8)
            if live(cut, args.jobs, seconds) is not None:
                print(f"life {lives}: ended by itself within {seconds:.1f} s; no more kills", flush=True)
                break
            lives += 1
            done = len(list((cut / "sweep").glob("*/result.json")))
            print(f"life {lives}: killed after {seconds:.1f} s, {done} jobs finished", flush=True)
        begun = time.perf_counter()
        status = live(cut, args.jobs, None)
        print(f"last life: status {status}, {time.perf_counter() - begun:.0f} s", flush=True)
        same = [ours == theirs for ours, theirs in zip(numbers(cut, args.jobs), numbers(whole, args.jobs), strict=True)]
        left = [p.name for p in (cut / "sweep").rglob("*") if p.name.endswith((".tmp", ".partial"))]
    print(f"{lives} kills; {sum(same)} of {len(same)} results equal to the last bit; left behind: {left or 'nothing'}")
    sys.exit(0 if all(same) and not left and status == 0 else 1)


if __name__ == "__main__":
    main()
