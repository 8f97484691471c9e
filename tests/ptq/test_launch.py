"""Processes of one ``accelerate launch`` share a job: the numbers are those of one process, and a failure ends all."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.jobs import QUICK, TWO, short
from wanquant.runs.run import read_result

#: What may differ: when, where and by whom it was made.
PASSING = ("timings", "memory", "planned")
CALIBRATED = (
    'calib.texts=["a red square moving up on a gray background","a cyan square moving right on a white background"]'
)
#: Six measured pairs and two of calibration in batches of one; blocks chosen by what the calibration says.
SMALL = [f"model.path={short(3)}", "model.batch=1", *QUICK, TWO, "prompts.seeds=[0,1,2]", CALIBRATED, "tracker=none"]
CHOSEN = ["protect=none", "protect.by=sensitivity", "protect.budget=1", "eval.block_sqnr=true", "checkpoint=false"]


def numbers(folder: Path) -> dict[str, Any]:
    result = read_result(folder)
    found = {key: value for key, value in result.items() if key not in PASSING}
    left_out = ("from_cache", "processes", "made_by_process")
    found["provenance"] = {key: value for key, value in result["provenance"].items() if key not in left_out}
    return found


def launched(*words: str, before: Sequence[Callable[[], object] | None] = ()) -> tuple[list[int], str, list[str]]:
    """Two processes: their exit statuses, all they have printed, and the lines of their errors."""
    started = forked.launch(words, before=before)
    errors = [line for each in started for line in each.err.read_text().splitlines() if line.startswith("error: ")]
    return [each.wait() for each in started], "".join(each.out.read_text() for each in started), errors


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["quantize", "analyze"])
def test_two_processes_give_the_numbers_of_one(mode: str, tmp_path: Path) -> None:
    words = ["ptq.py", f"mode={mode}", f"analysis.sensitivity={mode == 'analyze'}", *SMALL, *CHOSEN]
    one = [*words, f"cache={tmp_path / 'cache-one'}", f"hydra.run.dir={tmp_path / 'one'}"]
    assert forked.run(one).returncode == 0
    two = [*words, f"cache={tmp_path / 'cache-two'}", f"hydra.run.dir={tmp_path / 'two'}"]
    statuses, said, errors = launched(*two)
    assert (statuses, errors) == ([0, 0], [])
    assert said.count("wanquant ") == 1  # the second says nothing
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    files = [{path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1]
    # Each made some, and nothing was made twice.
    assert read_result(tmp_path / "one")["provenance"].keys().isdisjoint({"processes", "made_by_process"})
    made = read_result(tmp_path / "two")["provenance"]["made_by_process"]
    expected = {"statistics": 3, "trajectories": 2, "sensitivity": 3, "block_errors": 2}  # two videos, and the whole
    if mode == "quantize":
        expected |= {"trajectories": 8, "single_steps": 6, "latents": 2 + 6 + 6 + 6}
    else:
        expected |= {"latents": 2, "sensitivity": 3 + 10}  # each block, and each kind of linear
    assert {kind: sum(each.get(kind, 0) for each in made) for kind in expected} == expected
    assert all(each.get("trajectories", 0) + each.get("sensitivity", 0) > 0 for each in made), made
    # Again, and once more from the beginning: what is finished is not begun by anybody, and force makes it anew.
    assert launched(*two)[0] == [0, 0]
    assert read_result(tmp_path / "two")["provenance"]["made_by_process"] == made
    assert launched(*two, "force=true")[0] == [0, 0]
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    again = read_result(tmp_path / "two")["provenance"]["made_by_process"]
    assert sum((each.get("latents", 0) for each in again), 0) == (6 if mode == "quantize" else 0)


def write_little() -> None:
    """From now on this process can write no file of more than a few kilobytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_an_error_in_one_ends_all_in_one_line(tmp_path: Path) -> None:
    words = ["ptq.py", *SMALL, f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}"]
    # All would be told the same.
    statuses, said, errors = launched(*words, "protect.blocks=[0,7]")
    assert statuses == [1, 1]
    assert [error.partition(":")[0] for error in errors] == ["error"], errors
    assert "7" in errors[0]
    assert said.count("wanquant ") == 1
    # Only the second meets it, wherever the first is.
    statuses, _, errors = launched(*words, "protect.blocks=[0]", before=[None, write_little])
    assert statuses == [1, 1]
    assert [error[:31] for error in errors] == ["error: process 1: cannot write "], errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "process 1" in result["error"]
    # In a sweep the next job is begun by all of them; and what has workers of its own is refused.
    sweep = ["ptq.py", "-m", "protect.blocks=[0,7],[0]", *SMALL, f"cache={tmp_path / 'cache'}", "checkpoint=false"]
    sweep += ["eval.videos=false", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    statuses, said, errors = launched(*sweep)
    assert statuses == [1, 1]
    assert [error[:13] for error in errors] == ["error: job 0:"] * 2, errors  # where it happens, and below the table
    assert said.count("rank") > 0
    made = read_result(tmp_path / "sweep" / "1")["provenance"]["made_by_process"]
    assert sum(each.get("single_steps", 0) for each in made) == 6, made  # by whom, is a matter of time
    statuses, said, errors = launched(*sweep, "hydra/launcher=joblib")
    assert statuses == [1, 1]
    assert errors == ["error: 2 processes share each job of a sweep: leave out hydra/launcher"]
