"""Several processes on the same job, started by ``accelerate launch`` or ``torchrun``: each goes through its stages and
makes what no other is at (``wanquant.runs.cache``), and the first alone decides, writes and prints.

They speak through the key-value store by which torch's processes find each other. A failure of one ends the job in all
of them: the first tells it, in one line, and every exit status is 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from wanquant import interrupt

#: Seconds between two looks at the store; for another process to answer; for it to stop what it is at.
LOOK, ANSWER, STOP = 0.05, 5.0, 30.0


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this process is the one that writes, as it is where it is alone."""
    return rank() == 0


class FailedElsewhere(Exception):
    """Another process has failed; the message is what it would have told."""


class Job:
    """What the processes know of a job: ``store`` is theirs and the job's, None of one process alone."""

    def __init__(self, store: Any = None) -> None:
        self.store, self.made, self.over = store, Counter[str](), threading.Event()

    def failure(self) -> str | None:
        """What another process has failed by."""
        try:
            if not self.store.check(["failed"]):
                return None
            told: list[Any] = json.loads(self.store.get("failed"))
        except RuntimeError:  # the first process kept the store, and is gone
            return "the first process of the launch has ended"
        return None if told[0] == rank() else str(told[1])

    def fail(self, line: str) -> None:
        """For all, unless another has failed before."""
        line = line if first() else f"process {rank()}: {line}"
        self.store.compare_set("failed", "", json.dumps([rank(), line]))

    def hear(self, name: str) -> None:
        """Waits until the word has been said."""
        while True:
            if (line := self.failure()) is not None:
                raise FailedElsewhere(line)
            if self.store.check([name]):
                return
            time.sleep(LOOK)

    def watch(self) -> None:
        """Ends what the main thread is at when another process has failed."""
        while not self.over.wait(10 * LOOK):
            line = self.failure()
            if line is not None:
                for _ in range(int(STOP / ANSWER)):  # a library may swallow it
                    interrupt.stop(FailedElsewhere(line))
                    if self.over.wait(ANSWER):
                        return
                print(f"error: {line}", file=sys.stderr)
                interrupt.end(1)


_job = Job()


@contextlib.contextmanager
def joined(number: int, told: Callable[[BaseException], str]) -> Iterator[None]:
    """The job of this number, together with the other processes, which have to be at it too: ends when it has ended in
    the first. ``told`` makes a line of an error. Nothing of one process alone."""
    global _job
    if processes() == 1:
        yield
        return
    _job = Job(_store(number))
    watcher = threading.Thread(target=_job.watch, name="launch", daemon=True)
    watcher.start()
    try:
        yield
        if not first():
            _job.hear("ended")
        elif (line := _job.failure()) is not None:
            raise FailedElsewhere(line)
        else:
            _job.store.set("ended", "")
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the store is gone
            _tell_failure(_job, error, told)
        raise
    finally:
        _part(_job)
        _job.over.set()
        watcher.join()
        _job = Job()


def _store(number: int) -> Any:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    except RuntimeError as error:
        raise ValueError(f"the processes of the launch do not find each other: {str(error).splitlines()[0]}") from error
    return PrefixStore(f"wanquant {number}", store)


def _tell_failure(job: Job, error: BaseException, told: Callable[[BaseException], str]) -> None:
    """Of another process the first tells it; where that does not come, the process itself."""
    ended = isinstance(error, KeyboardInterrupt | SystemExit)
    if first():
        job.fail("interrupted" if ended else told(error))
        job.store.set("ended", "")
    elif not ended and not isinstance(error, FailedElsewhere):
        job.fail(told(error))
        begun = time.monotonic()
        while not job.store.check(["ended"]) and time.monotonic() - begun < STOP + ANSWER:
            time.sleep(LOOK)
        if not job.store.check(["ended"]):
            print(f"error: process {rank()}: {told(error)}", file=sys.__stderr__, flush=True)


def _part(job: Job) -> None:
    """The first may keep the store, so it goes last."""
    with contextlib.suppress(RuntimeError):
        job.store.set(f"left {rank()}", "")
        begun = time.monotonic()
        others = [f"left {each}" for each in range(1, processes())] if first() else []
        while others and not job.store.check(others) and time.monotonic() - begun < ANSWER:
            time.sleep(LOOK)


def say(name: str, value: Any = None) -> None:
    """By the first process; ``value`` is plain JSON. A name is said once in a job."""
    if _job.store is not None:
        _job.store.set(name, json.dumps(value))


def hear(name: str) -> Any:
    """What the first process says, which is waited for."""
    _job.hear(name)
    return json.loads(_job.store.get(name))


def once(name: str, do: Callable[[], object]) -> None:
    """Done by the first process, and waited for by the others."""
    if first():
        do()
        say(name)
    elif _job.store is not None:
        hear(name)


def count(kind: str) -> None:
    """That this process has made an artefact of this kind."""
    _job.made[kind] += 1
    if _job.store is not None:
        _job.store.set(f"made {rank()}", json.dumps(_job.made))


def shares() -> dict[str, Any]:
    """For a result: how many processes made how many artefacts of each kind; nothing of one alone."""
    if _job.store is None:
        return {}
    names = [f"made {each}" for each in range(processes())]
    made = [json.loads(_job.store.get(name)) if _job.store.check([name]) else {} for name in names]
    return {"processes": processes(), "made_by_process": made}


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """For a process that is not the first: what it prints goes nowhere, and Hydra's directories of it are away when it
    ends. An error that leaves this is printed as ever."""
    if first():
        yield
        return
    interrupt.hush()
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere:
        sys.argv += [f"hydra.run.dir={scratch}/run", f"hydra.sweep.dir={scratch}/sweep"]
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
