"""Commands in a process of their own, which need not import anything: they are forked from one that has.

A process that imports diffusers takes as long as ten small jobs. Where a test needs a process, to kill it or to limit
it, but not its start, ``run`` and ``start`` give one within a tenth of a second. The process they are forked from has
imported all that the jobs need and has done nothing else, so that no thread of its is lost. Not for what starts workers
of its own: joblib's are waited for at the end, five minutes long.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["wanquant.ptq.job", "wanquant.qat.job", "wanquant.evaluate.job", "wanquant.config", "tests.qat.small"]


@cache
def context() -> Any:
    """For processes that run functions."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


class Forked:
    """As ``subprocess.Popen``, with what was printed kept in files."""

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], before: Callable[[], object] | None
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="wanquant-forked-"))
        self.out, self.err = folder / "out", folder / "err"
        # The whole of it: what is forked from has the variables of the time it was started.
        given = (list(words), {**os.environ, **environment}, str(self.out), str(self.err), before)
        self.process = context().Process(target=_child, args=given)
        self.process.start()

    def poll(self) -> int | None:
        status: int | None = self.process.exitcode
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        status: int = self.process.exitcode
        return status


def start(
    words: Sequence[str], environment: Mapping[str, str] | None = None, before: Callable[[], object] | None = None
) -> Forked:
    """Of ``words`` as they stand behind ``python``: a script, ``-m`` and a module, or ``-c`` and code. Works in the
    checkout; ``environment`` is added, and ``before`` called in the process first."""
    return Forked(words, environment or {}, before)


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    forked = start(words, environment, before)
    status = forked.wait()
    return subprocess.CompletedProcess(list(words), status, forked.out.read_text(), forked.err.read_text())


def launch(words: Sequence[str], count: int = 2, before: Sequence[Callable[[], object] | None] = ()) -> list[Forked]:
    """Processes with the variables that ``accelerate launch`` gives them, started all and ended all; ``before`` is of
    each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = itertools.zip_longest(range(count), before)
    started = [start(words, {**where, "RANK": str(n), "LOCAL_RANK": str(n)}, first) for n, first in each]
    for process in started:
        process.wait()
    return started


def _child(
    words: list[str], environment: dict[str, str], out: str, err: str, before: Callable[[], object] | None
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if before is not None:
        before()
    if words[0] in ("-m", "-c"):
        kind, what, *rest = words
        sys.argv = [kind, *rest]
    else:
        kind, what, *rest = "", *words
        sys.argv = [what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(what, "<given>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(what, run_name="__main__")
