"""What is finished is not run again, wherever it lies, and only if it is really there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.results import changed
from wanquant.runs.cache import Cache
from wanquant.runs.finished import find_finished, note_finished, take_over
from wanquant.runs.run import Run, read_result

ASKED = "a" * 64
NAMES = {"protect": {"name": "none"}, "quant": {"name": "hif8_w8a8"}, "model": {"name": "tiny"}}


def finished(folder: Path, cache: Cache, checkpoint: bool = True) -> Path:
    run = Run(folder, "ptq", "a: 1\n", NAMES)
    (folder / "videos" / "bf16").mkdir(parents=True)
    (folder / "videos" / "bf16" / "0.mp4").write_text("film")
    if checkpoint:
        (folder / "checkpoint").mkdir()
    result = {k: v for k, v in changed({}).items() if k not in ("schema", "status", "error", "timings")}
    run.finish({**result, "signature": "s"}, lambda _: None)
    note_finished(cache, ASKED, folder)
    return folder


def test_it_is_found_while_it_is_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert find_finished(cache, ASKED, False) is None
    folder = finished(tmp_path / "run", cache, checkpoint=False)
    assert find_finished(cache, ASKED, False) == folder
    assert find_finished(cache, "b" * 64, False) is None
    assert find_finished(cache, ASKED, with_checkpoint=True) is None
    Run(folder, "ptq", "", NAMES).fail(ValueError("no"))
    assert find_finished(cache, ASKED, False) is None
    folder.rename(tmp_path / "elsewhere")
    assert find_finished(cache, ASKED, False) is None


def test_it_is_taken_over_under_the_names_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = finished(tmp_path / "run", Cache(tmp_path / "cache"))
    published: list[Any] = []
    names = {**NAMES, "protect": {"name": "blocks=[]"}}
    folder = tmp_path / "other"
    taken = take_over(source, folder, "a: 2\n", names, lambda *what: published.append(what))
    assert "force=true runs it again" in capsys.readouterr().out
    assert taken == read_result(folder)
    assert taken["protect"] == {**read_result(source)["protect"], "name": "blocks=[]"}
    assert taken["metrics"] == read_result(source)["metrics"]
    assert taken["provenance"]["taken_from"] == str(source)
    assert published == [(folder, taken)]
    assert (folder / "videos" / "bf16" / "0.mp4").read_text() == "film"
    assert (folder / "checkpoint").is_dir()
    assert (folder / "config.yaml").read_text().endswith("a: 2\n")
    # The other's files are not ours to change.
    Run(folder, "ptq", "", NAMES)
    assert (source / "videos" / "bf16" / "0.mp4").read_text() == "film"


def test_in_its_own_folder_nothing_is_touched(tmp_path: Path) -> None:
    source = finished(tmp_path / "run", Cache(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    take_over(source, source, "a: 2\n", NAMES, lambda *_: pytest.fail("drawn again"))
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    renamed = take_over(source, source, "", {**NAMES, "quant": {"name": "mine"}}, lambda *_: None)
    assert read_result(source)["quant"]["name"] == renamed["quant"]["name"] == "mine"
    assert (source / "videos" / "bf16" / "0.mp4").exists()
