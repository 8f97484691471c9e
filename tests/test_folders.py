"""Folders with spaces, ``=``, commas, brackets, letters outside of ASCII, and long names, in all three programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.jobs import QUICK, TWO, run, short
from tests.qat.short import overrides
from wanquant.runs.run import read_result

#: 255 bytes are the most that a name may have.
NAME = "a b=c, d; über-模型 (1) [x] {y} #~%20 'q'" + 200 * "n"


def quoted(key: str, folder: Path) -> str:
    text = str(folder).replace('"', '\\"')
    return f'{key}="{text}"'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    shutil.copytree(short(4), tmp_path / NAME / "model")
    return tmp_path / NAME


@pytest.mark.slow
def test_a_conversion_and_what_is_planned_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tracker=none", "protect=none", quoted("cache", home / "cache"), quoted("model.path", home / "model")]
    where = [quoted("hydra.run.dir", home / "run"), quoted("convert.to", home / "made")]
    assert run(monkeypatch, "ptq", "mode=convert", *words, *where) == 0
    assert read_result(home / "run")["convert"]["checkpoint"] == str(home / "made")
    words[1:] = [words[2], quoted("model.path", home / "made"), quoted("reference", home / "model"), *QUICK]
    assert run(monkeypatch, "eval", *words, "dry_run=true", quoted("hydra.run.dir", home / "dry")) == 0


@pytest.mark.slow
def test_whole_jobs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = quoted("cache", home / "cache"), quoted("model.path", home / "model")
    words = [*QUICK, TWO, "prompts.seeds=[0]", "eval.noise_floor=false", "protect=ends", cache, model]
    assert run(monkeypatch, "ptq", *words, quoted("hydra.run.dir", home / "ptq")) == 0
    new = 'prompts.texts=["a green circle moving down on a white background"]'
    assert run(monkeypatch, "eval", quoted("run", home / "ptq"), new, "tracker=none", cache) == 0
    assert len(read_result(home / "ptq")["evaluations"]) == 1
    words = [*overrides(home / "model", home, "qat.scope=all")]
    words = [word for word in words if word.partition("=")[0] not in ("cache", "model.path")]
    assert run(monkeypatch, "train", *words, cache, model, quoted("hydra.run.dir", home / "train")) == 0
    assert (home / "train" / "checkpoint").is_dir()
