"""The training job on the first four blocks of tiny-wan, as quick as it gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ptq.test_job import QUICK, ROOT, TWO
from wanquant import config, load_pipeline
from wanquant.runs.run import read_result

__all__ = ["LEARNED", "ROOT", "make_short", "overrides", "result_of", "train"]

LEARNED = [
    "a cyan square moving right on a white background",
    "a purple circle moving up on a gray background",
    "a green triangle moving down on a gray background",
]


def make_short(folder: Path) -> Path:
    """A pipeline whose four blocks are tiny-wan's first, and of which nothing else is changed."""
    pipe = load_pipeline("tiny", device="cpu")
    pipe.transformer.blocks = torch.nn.ModuleList(list(pipe.transformer.blocks)[:4])
    pipe.transformer.register_to_config(num_layers=4)
    pipe.save_pretrained(folder)
    return folder


def overrides(model: Path, cache: Path, *more: str) -> list[str]:
    asked = [
        f"model.path={model}",
        *QUICK,
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
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    try:
        config.main("train")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def result_of(folder: Path) -> dict[str, Any]:
    result = read_result(folder)
    assert (result["status"], result["job"]) == ("ok", "train")
    return result
