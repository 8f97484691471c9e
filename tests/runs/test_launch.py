"""Processes of one launch: what they tell each other, how they divide work, and that a failure of one ends all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wanquant import interrupt
from wanquant.runs import launch
from wanquant.runs.cache import Cache
from wanquant.wan.device import launched_cards


def in_processes(count: int, do: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What ``do`` returns in each process of a launch, or the line of what it raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def work(rank: int) -> None:
        os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        interrupt.watch()
        try:
            with launch.joined(0, str):
                result = do(folder)
        except (ValueError, launch.FailedElsewhere) as error:
            result = f"{type(error).__name__}: {error}"
        found.put((rank, result))
        found.close()
        found.join_thread()
        os._exit(0)

    started = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    results = dict(found.get(timeout=60) for _ in started)
    for process in started:
        process.join()
    return [results[rank] for rank in range(count)]


def make_all(root: Path) -> tuple[list[int], int, Any]:
    """Of 8 folders and 8 cells those that this process has made; what the first has found; who has made how many."""
    cache, made, found = Cache(root), list[int](), []

    def slowly(number: int) -> int:
        time.sleep(0.05)
        made.append(number)
        return number

    def write(number: int) -> Callable[[Path], None]:
        return lambda folder: (folder / "a").write_text(str(slowly(number))) and None

    for number in range(8):
        cache.offer("things", str(number), write(number))
    for number in range(8):
        cache.folder("things", str(number), write(number))
    cells, names = cache.cells("measured", "all"), [str(number) for number in range(8, 16)]
    cells.shared(names, lambda mine: [slowly(int(name)) for name in mine], iter(lambda: 1, 0))
    launch.once("found", lambda: found.append(made[0]))
    launch.say("value", [1, None]) if launch.first() else found.append(launch.hear("value"))
    launch.once("all are through", lambda: time.sleep(0.2))
    return made, found, launch.shares()


def test_each_makes_what_no_other_is_at(tmp_path: Path) -> None:
    results = in_processes(3, make_all, tmp_path)
    assert sorted(number for made, *_ in results for number in made) == list(range(16))
    assert all(len(made) > 1 for made, *_ in results)
    assert [found for _, found, _ in results] == [[results[0][0][0]], [[1, None]], [[1, None]]]
    shares = results[0][2]
    assert shares["processes"] == 3
    counted = [each.get("things", 0) + each.get("measured", 0) for each in shares["made_by_process"]]
    assert counted == [len(made) for made, *_ in results]


def fail_in_second(_: Path) -> None:
    if launch.rank() == 1:
        raise ValueError("no card")
    with contextlib.suppress(Exception):  # as some library may do
        time.sleep(60)
    time.sleep(60)


def fail_in_first(_: Path) -> None:
    if launch.first():
        raise ValueError("disk full")
    launch.hear("never said")


def test_a_failure_of_one_ends_all(tmp_path: Path) -> None:
    began = time.monotonic()
    told = "process 1: no card"
    assert in_processes(3, fail_in_second, tmp_path) == [
        f"FailedElsewhere: {told}",
        "ValueError: no card",
        f"FailedElsewhere: {told}",
    ]
    assert in_processes(2, fail_in_first, tmp_path) == ["ValueError: disk full", "FailedElsewhere: disk full"]
    assert time.monotonic() - began < 20


def test_one_process_alone_tells_nobody() -> None:
    done: list[int] = []
    with launch.joined(0, str), launch.unseen():
        launch.once("a", lambda: done.append(1))
        launch.say("b", 2)
        launch.count("things")
        assert launch.shares() == {}
    assert done == [1]
    assert not any(word.startswith("hydra.run.dir") for word in sys.argv)


def test_each_takes_the_card_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(launched_cards(4)) == [0, 1, 2, 3]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert list(launched_cards(4)) == [2]
    with pytest.raises(ValueError, match="2 cards, and each process takes one: lower --num_processes"):
        launched_cards(2)
