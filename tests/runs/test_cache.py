"""Shared artefacts: made once, also by processes side by side; damage is found; a dead holder blocks nobody."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests import forked
from wanquant.runs.cache import Cache, damaged
from wanquant.runs.files import SUMS
from wanquant.wan.device import first_free

FORKED = forked.context()


def make_slowly(root: Path, notes: Path) -> None:
    def make(folder: Path) -> None:
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (folder / "data").write_text("42")

    assert (Cache(root).folder("kind", "s", make) / "data").read_text() == "42"


def hold(path: Path, ready: Path) -> None:
    with FileLock(path):
        ready.touch()
        time.sleep(600)


def test_side_by_side_it_is_made_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    workers = [FORKED.Process(target=make_slowly, args=(tmp_path / "cache", notes)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(notes.read_text().splitlines()) == 1


def test_a_dead_holders_lock_does_not_block(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And what it had begun is begun again."""
    cache, ready = Cache(tmp_path), tmp_path / "ready"
    (tmp_path / "kind" / "s.partial").mkdir(parents=True)
    (tmp_path / "kind" / "s.partial" / "half").touch()
    holder = FORKED.Process(target=hold, args=(tmp_path / "kind" / "s.lock", ready))
    holder.start()
    while not ready.exists():
        time.sleep(0.05)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    folder = cache.folder("kind", "s", lambda folder: (folder / "data").touch())
    assert {path.name for path in folder.iterdir()} == {"data", SUMS}
    assert "waiting" not in capfd.readouterr().err


def test_damage_is_found_said_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "data").write_bytes(b"0123456789")

    folder = Cache(tmp_path).folder("kind", "s", make)
    assert Cache(tmp_path).folder("kind", "s", make) == folder
    assert len(made) == 1
    for harm in (
        lambda: (folder / "data").write_bytes(b"0123456780"),
        lambda: (folder / "data").unlink(),
        lambda: (folder / SUMS).unlink(),
        lambda: (folder / SUMS).write_text(""),
    ):
        before = len(made)
        harm()
        assert not Cache(tmp_path).has("kind", "s")
        cache = Cache(tmp_path)
        cache.folder("kind", "s", make)
        assert capsys.readouterr().err.count("damaged") == 1
        assert len(made) == before + 1
        assert cache.made == {folder}
        assert damaged(folder) is None


def test_an_error_while_making_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "data").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Cache(tmp_path).folder("kind", "s", fail)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == ["s.lock"]
    Cache(tmp_path).folder("kind", "s", lambda folder: (folder / "data").touch())

    def write_nowhere(folder: Path) -> None:
        save_file({"a": torch.zeros(1)}, folder / "missing" / "data.safetensors")

    with pytest.raises(OSError, match=r"cannot write .*kind/t"):
        Cache(tmp_path).folder("kind", "t", write_nowhere)


def test_parts_and_what_is_forgotten_go_away(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in ("s", "s-000", "s-001", "t-000"):
        cache.folder("kind", name, lambda folder: (folder / "data").touch())
    cache.forget_parts("kind", "s")
    assert {path.name for path in (tmp_path / "kind").iterdir() if path.is_dir()} == {"s", "t-000"}
    cache.forget("kind", "s")
    assert not cache.has("kind", "s")


def test_a_cell_is_measured_once_and_again_when_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells, calls = Cache(tmp_path).cells("kind", "s"), []

    def measure() -> list[float]:
        calls.append(1)
        return [1.5, float("nan")]

    for _ in range(2):
        first, second = cells.measured("a b", measure)
        assert first == 1.5
        assert second != second
    assert len(calls) == 1
    path = tmp_path / "kind" / "s" / "a b.json"
    for text in (path.read_text().replace("1.5", "1.6"), "{", '{"value": 1}', "[]"):
        path.write_text(text)
        cells.measured("a b", measure)
        assert capsys.readouterr().err.count("damaged") == 1
    assert len(calls) == 5


def take(names: list[str], folder: Path, ready: Path) -> None:
    with first_free(names, folder) as index:
        (ready / str(index)).touch()
        time.sleep(600)


def test_each_job_has_a_card_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs in processes of their own take the first that is free; a killed job's is free again."""
    ready, names = tmp_path / "ready", ["card-0", "card-1"]
    ready.mkdir()
    jobs = [FORKED.Process(target=take, args=(names, tmp_path / "locks", ready)) for _ in names]
    for job in jobs:
        job.start()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.05)
    with first_free([*names, "card-2"], tmp_path / "locks") as index:
        assert index == 2
    for job in jobs:
        job.kill()
        job.join()
    with first_free(names, tmp_path / "locks") as index:
        assert index == 0
        with first_free(names, tmp_path / "locks") as second:
            assert second == 1


def share(root: str, both: Any, done: Any) -> None:
    cells = Cache(Path(root)).cells("kind", "s")
    begun: list[bool] = []

    def measure(names: list[str]) -> list[str]:
        if not begun:  # the first batch of each is in hand while the other's is
            begun.append(True)
            both.wait(timeout=120)
        for name in names:
            (Path(root) / "measured").mkdir(exist_ok=True)
            (Path(root) / "measured" / f"{name}-{os.getpid()}").touch()
        return [name.upper() for name in names]

    done.put((os.getpid(), cells.shared([f"n{i}" for i in range(9)], measure, itertools.repeat(2))))


def test_processes_side_by_side_share_the_cells(tmp_path: Path) -> None:
    both, done = FORKED.Barrier(2), FORKED.Queue()
    workers = [FORKED.Process(target=share, args=(str(tmp_path), both, done)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = dict(done.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert all(values == {f"n{i}": f"N{i}" for i in range(9)} for values in found.values())
    measured = [path.name for path in (tmp_path / "measured").iterdir()]
    assert len(measured) == 9
    assert {int(name.split("-")[1]) for name in measured} == set(found)


def test_a_shared_measurement_that_fails_leaves_what_is_done(tmp_path: Path) -> None:
    cells = Cache(tmp_path).cells("kind", "s")
    asked: list[str] = []

    def measure(names: list[str]) -> list[int]:
        asked.extend(names)
        if "c" in names:
            raise RuntimeError("stop")
        return [1] * len(names)

    with pytest.raises(RuntimeError, match="stop"):
        cells.shared(["a", "b", "c"], measure, itertools.repeat(1))
    assert cells.shared(["a", "b"], measure, itertools.repeat(1)) == {"a": 1, "b": 1}
    assert asked == ["a", "b", "c"]
