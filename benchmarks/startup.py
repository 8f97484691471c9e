"""How long a command takes to say something, with its files in the disk cache: the median of five.

    python -m benchmarks.startup [--write]

*First line*: from the start of the process to the first line it prints, of a job before its imports. *Answer*: to its
end, of a command that has nothing to do. Beside them what ``import torch`` and ``import diffusers`` take here.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kernels import machine

ROOT = Path(__file__).resolve().parents[1]
RUNS = 5
#: Seconds that a first line, and an answer, may take.
FIRST, ANSWER = 1.5, 2.5
FIRST_LINES = {
    "ptq.py": ["ptq.py", "tracker=none"],
    "train.py": ["train.py", "tracker=none"],
    "eval.py": ["eval.py", "run=nowhere"],
    "a sweep": ["ptq.py", "-m", "protect=none,boundary", "tracker=none"],
    "wanquant report": ["-m", "wanquant.report", "nowhere"],
    "wanquant export": ["-m", "wanquant.export", "nowhere", "there", "--layout", "bf16"],
    "wanquant doctor": ["-m", "wanquant.doctor"],
}
ANSWERS = {
    **{f"{name}.py --help": [f"{name}.py", "--help"] for name in ("ptq", "train", "eval")},
    "wanquant --help": ["-m", "wanquant", "--help"],
    "wanquant doctor --help": ["-m", "wanquant.doctor", "--help"],
    "a misspelt key": ["ptq.py", "protec=boundary"],
    "a misspelt preset": ["train.py", "protect=boundry"],
    "a misspelt value": ["ptq.py", "quant.product=exct"],
}


def first_line(words: list[str], folder: Path) -> float:
    """Seconds to the first line of stdout; what comes behind it is not waited for."""
    where = "hydra.sweep.dir" if "-m" in words[1:] else "hydra.run.dir"
    given = [f"{where}={folder / 'run'}"] if words[0].endswith(".py") else []
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words, *given], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip(), words
    seconds = time.perf_counter() - begun
    process.kill()
    process.wait()
    return seconds


def answer(words: list[str], _: Path) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    lines = ["| | median, s | of five, s | bar, s | |", "|---|---|---|---|---|"]
    missed = False
    imports = {f"import {name}": ["-c", f"import {name}"] for name in ("torch", "diffusers")}
    for kind, cases, bar, measure in (
        ("first line", FIRST_LINES, FIRST, first_line),
        ("answer", ANSWERS, ANSWER, answer),
        ("beside", imports, None, answer),
    ):
        for name, words in cases.items():
            with tempfile.TemporaryDirectory() as scratch:
                measure(words, Path(scratch))  # for warmth
                found = sorted(measure(words, Path(scratch)) for _ in range(RUNS))
            median = statistics.median(found)
            missed |= bar is not None and median > bar
            verdict = "" if bar is None else "MISSED" if median > bar else "met"
            row = f"| {kind}: {name} | {median:.2f} | {found[0]:.2f} to {found[-1]:.2f} | {bar or ''} | {verdict} |"
            lines.append(row)
            print(row, flush=True)
    if args.write:
        name = f"{datetime.datetime.now():%Y-%m-%d-%H%M}-startup-{os.cpu_count()}-core.md"
        text = "\n".join(["# Start-up", "", "`python -m benchmarks.startup --write`", "", *lines, "", machine(), ""])
        (ROOT / "benchmarks" / "results" / name).write_text(text)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
