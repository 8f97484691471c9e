from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanquant.ptq.config import PTQConfig
from wanquant.runs import pictures
from wanquant.runs.files import write_atomic
from wanquant.runs.run import Run, clean_json, read_result
from wanquant.runs.signature import GENERATES, MEASURES, code_hash, signature, what_it_does
from wanquant.wan.device import forget_peak_memory, peak_memory, pick_device

CPU = torch.device("cpu")
CONFIG = dataclasses.asdict(PTQConfig())


def leaves(config: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else [f"{path}{key}"]
    return found


def changed(path: str) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *parents, leaf = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[leaf] = "another value"
    return config


QUIET = {
    "cache",
    "dry_run",
    "force",
    "verify",
    "checkpoint",
    "quant.packed",
    "model.device",
    "model.path",
    "model.base",
    "model.lora",
    "model.lora_fuse",
    "model.offload",
    "model.generation.fps",
    "eval.dimensions",
    "eval.foreign_weights",
}


@pytest.mark.parametrize("path", leaves(CONFIG))
def test_the_signature_changes_with_what_changes_numbers_and_with_nothing_else(path: str) -> None:
    volatile = path in QUIET or path.startswith("tracker.") or path.split(".")[1:] in (["name"], ["by_language"])
    assert (signature(changed(path), "f", CPU) == signature(CONFIG, "f", CPU)) == volatile
    assert signature(CONFIG, "other weights", CPU) != signature(CONFIG, "f", CPU)


def test_code_counts_by_what_it_does() -> None:
    source = 'x = 1\n\n\ndef f(a):\n    """Doubles."""\n    return 2 * a  # twice\n'
    same = '"""A module."""\nx = 1\ndef f(a):\n    assert a\n    return (2 * a)\n'
    assert what_it_does(source) == what_it_does(same)
    assert what_it_does(source) != what_it_does(source.replace("2 *", "3 *"))
    assert len({code_hash(rooms) for rooms in (GENERATES, MEASURES, ("quant",))}) == 3


def test_json_knows_no_nan() -> None:
    assert clean_json({"a": (math.nan, math.inf, 1.0), 2: "x"}) == {"a": [None, None, 1.0], "2": "x"}


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds a list")])
def test_a_damaged_result_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"result.json {message}"):
        read_result(tmp_path)


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
    # Used again, the directory forgets what it held, but a directory of somebody else's is refused.
    Run(run.folder, "ptq", "a: 2\n")
    assert not (run.folder / "result.json").exists()
    (tmp_path / "home" / "videos").mkdir(parents=True)
    with pytest.raises(ValueError, match="neither empty nor a run directory"):
        Run(tmp_path / "home", "ptq", "")
    assert (tmp_path / "home" / "videos").exists()


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


def test_a_contact_sheet_stays_small_whatever_the_videos() -> None:
    for size in ((64, 64), (480, 832)):
        frames = np.zeros((5, *size, 3), np.uint8)
        sheet = pictures.contact_sheet([("a prompt", (("BF16", frames), ("hif8", frames)))] * 3)
        assert sheet.width < 1000
        assert sheet.height < 1400


def test_peak_memory_forgets_the_job_before() -> None:
    block = np.ones(200_000_000, np.uint8)
    high = peak_memory(CPU)
    del block
    forget_peak_memory(CPU)
    if peak_memory(CPU) == high:
        pytest.skip("this system does not let a process forget its peak")
    assert peak_memory(CPU) < high - 100_000_000


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "npu")
    for wrong in ("tpu", "cpu:x", "cuda:x", "auto:3"):
        with pytest.raises(ValueError, match="choose one of"):
            pick_device(wrong)
    if pick_device("auto").type == "cpu":
        for name in ("cuda", "npu"):
            with pytest.raises(ValueError, match=f"model.device={name}"):
                pick_device(name)
