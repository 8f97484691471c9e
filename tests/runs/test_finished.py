"""What is finished is not run again, wherever it lies, and only if it is really there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import forked
from tests.evaluate.results import changed
from wanquant.runs.cache import Cache
from wanquant.runs.finished import find_finished, in_use, note_finished, take_over
from wanquant.runs.run import Run, read_result

ASKED = "a" * 64
#: What a run writes itself.
HEAD = ("schema", "status", "error", "timings")
NAMES = {"protect": {"name": "none"}, "quant": {"name": "hif8_w8a8"}, "model": {"name": "tiny"}}


WANTED = {"fps": 8}
PACKED = {"fps": 8, "packed": False}


def finished(folder: Path, cache: Cache, checkpoint: bool = True) -> Path:
    run = Run(folder, "ptq", "a: 1\n", NAMES)
    (folder / "videos" / "bf16").mkdir(parents=True)
    (folder / "videos" / "bf16" / "0.mp4").write_text("film")
    if checkpoint:
        (folder / "checkpoint").mkdir()
    result = {k: v for k, v in changed({"generation.fps": 8, "quant.packed": False}).items() if k not in HEAD}
    run.finish({**result, "signature": "s", "asked": ASKED}, lambda _: None)
    note_finished(cache, ASKED, folder)
    return folder


def test_it_is_found_while_it_is_whole(tmp_path: Path) -> None:
    cache, new = Cache(tmp_path / "cache"), tmp_path / "new"
    assert find_finished(cache, ASKED, new, WANTED) is None
    folder = finished(tmp_path / "run", cache, checkpoint=False)
    assert find_finished(cache, ASKED, new, WANTED) == folder
    assert find_finished(cache, "b" * 64, new, WANTED) is None
    assert find_finished(cache, "b" * 64, folder, WANTED) is None
    assert find_finished(cache, ASKED, new, PACKED) is None
    assert find_finished(cache, ASKED, new, {"fps": 16}) is None
    # In its own folder it is found by itself.
    assert find_finished(Cache(tmp_path / "empty"), ASKED, folder, WANTED) == folder
    (folder / "checkpoint").mkdir()
    assert find_finished(cache, ASKED, new, PACKED) == folder
    assert find_finished(cache, ASKED, new, {"fps": 8, "packed": True}) is None
    folder.rename(tmp_path / "elsewhere")
    assert find_finished(cache, ASKED, new, WANTED) is None
    (tmp_path / "elsewhere").rename(folder)
    Run(folder, "ptq", "", NAMES).fail(ValueError("no"))
    assert find_finished(cache, ASKED, new, WANTED) is None


def test_it_is_taken_over_under_the_names_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = finished(tmp_path / "run", Cache(tmp_path / "cache"))
    names = {**NAMES, "protect": {"name": "blocks=[]"}}
    run = Run(tmp_path / "other", "ptq", "a: 2\n", names)
    (run.folder / "videos.partial").mkdir()
    taken = run.finish(take_over(run, source, names, with_checkpoint=True), lambda _: None)
    assert "force=true runs it again" in capsys.readouterr().out
    before = read_result(source)
    assert taken == read_result(run.folder)
    assert taken["protect"] == {**before["protect"], "name": "blocks=[]"}
    assert (taken["metrics"], taken["timings"], taken["asked"]) == (before["metrics"], before["timings"], ASKED)
    assert taken["provenance"]["taken_from"] == str(source)
    assert (run.folder / "videos" / "bf16" / "0.mp4").read_text() == "film"
    assert (run.folder / "checkpoint").is_dir()
    assert not (run.folder / "videos.partial").exists()
    # The other's files are not ours to change.
    again = Run(run.folder, "ptq", "", NAMES)
    assert (source / "videos" / "bf16" / "0.mp4").read_text() == "film"
    take_over(again, source, NAMES, with_checkpoint=False)
    assert not (run.folder / "checkpoint").exists()


def use(cache: Path, folder: Path, notes: Path) -> None:
    with in_use(cache, folder):
        with notes.open("a") as file:
            file.write("in\n")
        time.sleep(0.3)
        with notes.open("a") as file:
            file.write("out\n")


@pytest.mark.slow
def test_a_directory_is_one_process_at_a_time(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    arguments = (tmp_path / "cache", tmp_path / "run", notes)
    workers = [forked.context().Process(target=use, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert notes.read_text().split() == ["in", "out"] * 3
