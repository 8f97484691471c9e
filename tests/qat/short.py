"""The training job on the first four blocks of tiny-wan, as quick as it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import TWO, TWO_STEPS, run
from wanquant.runs.run import read_result

LEARNED = [
    "a cyan square moving right on a white background",
    "a purple circle moving up on a gray background",
    "a green triangle moving down on a gray background",
]


def overrides(model: Path, cache: Path, *more: str) -> list[str]:
    asked = [
        f"model.path={model}",
        *TWO_STEPS,
        TWO,
        f"qat.data.prompts.texts={json.dumps(LEARNED)}",
        "protect=ends",
        "calib.texts=[a red square moving up on a gray background]",
        "qat.steps=3",
        "qat.batch=4",
        "qat.warmup=1",
        "qat.lr=1e-2",
        "eval.noise_floor=false",
        "prompts.seeds=[0]",
        "tracker=none",
        "threads=1",
    ]
    given = {word.split("=")[0] for word in more}
    asked = [word for word in asked if word.split("=")[0] not in given]
    return [*more, *asked, *([] if "cache" in given else [f"cache={cache}"])]


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """``python train.py`` in this process; the exit status."""
    return run(monkeypatch, "train", *words)


def result_of(folder: Path) -> dict[str, Any]:
    result = read_result(folder)
    assert (result["status"], result["job"]) == ("ok", "train")
    return result
