from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wanquant.runs import pictures
from wanquant.runs.run import Run, clean_json, read_result, signature, write_atomic
from wanquant.wan.device import pick_device

CPU = torch.device("cpu")
CONFIG = {
    "model": {"path": "a", "device": "auto", "generation": {"steps": 20}},
    "quant": {"weights": {"rule": "amax/15"}},
    "tracker": {"name": "wandb"},
    "checkpoint": True,
}


def changed(path: str, value: object) -> dict[str, object]:
    config = copy.deepcopy(CONFIG)
    place = config
    *parents, leaf = path.split(".")
    for parent in parents:
        place = place[parent]  # type: ignore[assignment]
    place[leaf] = value  # type: ignore[assignment]
    return config  # type: ignore[return-value]


@pytest.mark.parametrize("path", ["model.path", "model.device", "tracker.name", "checkpoint"])
def test_volatile_keys_do_not_change_the_signature(path: str) -> None:
    assert signature(changed(path, "other"), "f", CPU) == signature(CONFIG, "f", CPU)


@pytest.mark.parametrize("path", ["model.generation.steps", "quant.weights.rule"])
def test_other_keys_do(path: str) -> None:
    assert signature(changed(path, "other"), "f", CPU) != signature(CONFIG, "f", CPU)
    assert signature(CONFIG, "other weights", CPU) != signature(CONFIG, "f", CPU)


def test_json_knows_no_nan() -> None:
    assert clean_json({"a": (math.nan, math.inf, 1.0), 2: "x"}) == {"a": [None, None, 1.0], "2": "x"}


def test_a_run_that_failed_looks_like_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "ptq", "a: 1\n")
    with pytest.raises(ValueError, match="not finished"):
        read_result(run.folder)
    run.fail(RuntimeError("out of luck"))
    result = read_result(run.folder)
    assert result["status"] == "failed"
    assert result["error"] == "RuntimeError: out of luck"
    assert "metrics" not in result
    assert "out of luck" in (run.folder / "log.txt").read_text()
    with run.stage("work"):
        pass
    full = run.finish({"metrics": {}}, publish=lambda _: None)
    assert read_result(run.folder) == json.loads(json.dumps(full))
    assert full["timings"]["work"] >= 0
    # Used again, the directory forgets what it held.
    Run(run.folder, "ptq", "a: 2\n")
    assert not (run.folder / "result.json").exists()


def test_a_failed_publication_leaves_no_result(tmp_path: Path) -> None:
    run = Run(tmp_path, "ptq", "")

    def publish(_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.finish({}, publish)
    assert not (tmp_path / "result.json").exists()


def test_atomic_writes_leave_no_temporary(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "x", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "one"


def test_broken_pixels_show() -> None:
    video = np.zeros((2, 4, 4, 3), np.float32)
    video[0, 1, 2, 0] = np.nan
    shown = pictures.to_uint8(video)
    assert tuple(shown[0, 1, 2]) == (255, 0, 255)
    assert shown.sum() == 510


def test_side_by_side_keeps_the_pixels() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8) for _ in range(2))
    row = pictures.side_by_side([a, b], ["left", "right"])
    assert row.shape[0] == 3
    assert row.shape[1] % 2 == row.shape[2] % 2 == 0
    assert (row[:, pictures.LABEL_HEIGHT :: 3, : 64 * 3 : 3] == a).all()


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "npu")
    with pytest.raises(ValueError, match="choose one of"):
        pick_device("tpu")
    if pick_device("auto").type == "cpu":
        for name in ("cuda", "npu"):
            with pytest.raises(ValueError, match=f"model.device={name}"):
                pick_device(name)
