"""Whole jobs as quick as they get: on eight of tiny-wan's blocks, one denoising step and five frames."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from wanquant import config, load_pipeline

ROOT = Path(config.CONF).parent
#: What the tests of this process share, instead of what the working tree has.
CACHE = tempfile.mkdtemp(prefix="wanquant-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
QUICK = ["model.generation.steps=1", "model.generation.num_frames=5", "model.device=cpu", "model.other_frames=[]"]
#: So that each of two transformers makes one, and a training has steps to learn from.
TWO_STEPS = ["model.generation.steps=2", *QUICK[1:]]
TWO = (
    'prompts.texts=["a red circle moving right on a black background","a blue square moving up on a white background"]'
)


def stopped_once(real: Callable[..., Any], after: int, calls: list[Any]) -> Callable[..., Any]:
    """``real``, but with an interrupt in the place of the call behind the first ``after``; ``calls`` comes to hold the
    second argument of each, and "cut" for that one."""

    def call(first: Any, second: Any, *args: Any, **how: Any) -> Any:
        if len(calls) == after:
            calls.append("cut")
            raise KeyboardInterrupt
        calls.append(second)
        return real(first, second, *args, **how)

    return call


@cache
def short(blocks: int = 8) -> Path:
    """A pipeline of tiny-wan's first blocks, of which nothing else is changed."""
    folder = Path(tempfile.mkdtemp(prefix="wanquant-short-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipe = load_pipeline("tiny", device="cpu")
    pipe.transformer.blocks = torch.nn.ModuleList(list(pipe.transformer.blocks)[:blocks])
    pipe.transformer.register_to_config(num_layers=blocks)
    pipe.save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, program: str, *words: str) -> int:
    """``python <program>.py`` in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
    try:
        config.main(program)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def ptq(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """``python ptq.py``, on the short model and as quick as it gets, without noise floors, but for what is asked."""
    asked = {override.split("=")[0] for override in overrides}
    usual = [f"cache={CACHE}"]
    if "model" not in asked:
        usual += [f"model.path={short()}", "eval.noise_floor=false", *QUICK]
    return run(monkeypatch, "ptq", *overrides, *(word for word in usual if word.split("=")[0] not in asked))
