"""A job gives the same numbers under every launcher, in a fresh process and in a used one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.jobs import QUICK, ROOT, TWO, run, short
from wanquant.runs.run import read_result

NUMBERS = ("signature", "metrics", "gates", "overflow", "conversion", "calibration")
JOBS = ("none", "boundary")


ENVIRONMENT = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def command(folder: Path, *overrides: str) -> list[str]:
    """Small jobs, with a cache of their own."""
    base = ["ptq.py", "-m", f"protect={','.join(JOBS)}", f"model.path={short()}", TWO, *QUICK]
    base += ["tracker=none", "checkpoint=false", f"cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    return [*base, *overrides]


def sweep(folder: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    """Their numbers, by protection. A launcher that has workers is started as a user starts it; else it is this process
    that does them."""
    if overrides:
        environment = {**os.environ, **ENVIRONMENT}
        words = [sys.executable, *command(folder, *overrides)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "rank" in done.stdout
    else:
        with pytest.MonkeyPatch.context() as patch:
            assert run(patch, "ptq", *command(folder)[1:]) == 0
    results = [read_result(folder / "sweep" / str(number)) for number in range(len(JOBS))]
    return {result["protect"]["name"]: {key: result[key] for key in NUMBERS} for result in results}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One after the other in one process: all but the first in a used one."""
    found = sweep(tmp_path_factory.mktemp("serial"))
    assert set(found) == set(JOBS)
    return found


@pytest.mark.slow
def test_joblib_side_by_side(serial: dict[str, Any], tmp_path: Path) -> None:
    assert sweep(tmp_path, *JOBLIB) == serial
    # One of them made it, and the others waited or came later.
    known = [read_result(tmp_path / "sweep" / str(number))["provenance"]["from_cache"] for number in range(len(JOBS))]
    for label in ("calibrate", "generate BF16", "noise floor: 1 ulp", "noise floor: seed"):
        assert sum(label not in reused for reused in known) == 1


@pytest.mark.slow
def test_ray(serial: dict[str, Any], tmp_path: Path) -> None:
    """A local cluster, which Ray starts itself."""
    assert sweep(tmp_path, "hydra/launcher=ray") == serial


@pytest.mark.slow
def test_submitit(serial: dict[str, Any], tmp_path: Path) -> None:
    """SLURM's launcher with its executor for one machine."""
    assert sweep(tmp_path, "hydra/launcher=submitit_local") == serial


@pytest.mark.slow
def test_workers_whose_launcher_was_killed_do_no_harm(serial: dict[str, Any], tmp_path: Path) -> None:
    """They may go on for a while, in the directories that the same command, given again, works in too."""
    for seconds in (25, 10):
        launcher = subprocess.Popen(
            [sys.executable, *command(tmp_path, *JOBLIB)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        launcher.kill()
        launcher.wait()
    assert sweep(tmp_path, *JOBLIB) == serial


@pytest.mark.slow
@pytest.mark.parametrize("threads", [None, pytest.param("2", marks=pytest.mark.slow)])
def test_a_fresh_process_gives_what_a_used_one_does(
    threads: str | None, serial: dict[str, Any], tmp_path: Path
) -> None:
    """And one that OpenMP has given other threads, for which everything has to be imported anew."""
    single = ["ptq.py", "protect=boundary", f"model.path={short()}", TWO, *QUICK, "tracker=none"]
    single += ["checkpoint=false", f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]
    if threads is None:
        assert forked.run(single).returncode == 0
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, *single], cwd=ROOT, check=True, capture_output=True, env=environment)
    assert {key: read_result(tmp_path / "run")[key] for key in NUMBERS} == serial["boundary"]
