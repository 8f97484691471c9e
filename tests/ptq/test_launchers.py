"""A job gives the same numbers under every launcher, in a fresh process and in a used one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ptq.test_job import ROOT, TWO
from wanquant.runs.run import read_result

NUMBERS = ("signature", "metrics", "gates", "overflow", "conversion", "calibration")
JOBS = ("none", "boundary", "exit")


def sweep(folder: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    """The numbers of three small jobs, each sweep with a cache of its own; by protection."""
    environment = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "ptq.py", "-m", f"protect={','.join(JOBS)}", TWO, "model.generation.steps=1"]
    command += ["tracker=none", "checkpoint=false", f"cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank" in done.stdout
    results = [read_result(folder / "sweep" / str(number)) for number in range(len(JOBS))]
    return {result["protect"]["name"]: {key: result[key] for key in NUMBERS} for result in results}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One after the other in one process: all but the first in a used one."""
    found = sweep(tmp_path_factory.mktemp("serial"))
    assert set(found) == set(JOBS)
    return found


def test_joblib_side_by_side(serial: dict[str, Any], tmp_path: Path) -> None:
    assert sweep(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == serial
    # Whoever was first made them, and the others waited.
    made = [read_result(tmp_path / "sweep" / str(number))["provenance"]["from_cache"] for number in range(len(JOBS))]
    for label in ("calibrate", "generate BF16", "noise floor: 1 ulp"):
        assert sum(label in known for known in made) >= len(JOBS) - 2
    assert len(list((tmp_path / "cache" / "statistics").glob("*/SHA256SUMS"))) == 1


def test_ray(serial: dict[str, Any], tmp_path: Path) -> None:
    """A local cluster, which Ray starts itself."""
    assert sweep(tmp_path, "hydra/launcher=ray") == serial


@pytest.mark.slow
def test_submitit(serial: dict[str, Any], tmp_path: Path) -> None:
    """SLURM's launcher with its executor for one machine."""
    assert sweep(tmp_path, "hydra/launcher=submitit_local") == serial


@pytest.mark.parametrize("name", ["boundary"])
def test_a_fresh_process_gives_what_a_used_one_does(serial: dict[str, Any], tmp_path: Path, name: str) -> None:
    command = [sys.executable, "ptq.py", f"protect={name}", TWO, "model.generation.steps=1", "tracker=none"]
    command += ["checkpoint=false", f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert {key: read_result(tmp_path / "run")[key] for key in NUMBERS} == serial[name]
