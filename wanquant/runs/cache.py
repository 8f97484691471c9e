"""Artefacts that several runs share, each in a folder named by its signature.

A folder is made under a lock, so that jobs that run side by side make it once and the others wait; the lock is the
operating system's and dies with its holder. It is written under a temporary name, with the SHA-256 of its files, and
renamed when whole; whoever opens it checks those sums, and what is damaged is made again. ``cells`` are folders that
grow: a small file for each finished piece of a long measurement, so that it can be stopped and taken up again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from wanquant.runs import launch
from wanquant.runs.files import read_sums, sum_of_file, sums_of, write_atomic, write_sums

#: Seconds that a process of a launch waits for the others before it says so.
PATIENCE = 30.0


@dataclass
class Cache:
    """Below ``root``: ``<kind>/<signature>/``, and a lock file beside each."""

    root: Path
    #: Folders that were not there before.
    made: set[Path] = field(default_factory=set)
    #: Folders whose sums have been checked.
    _whole: set[Path] = field(default_factory=set)

    def has(self, kind: str, signature: str) -> bool:
        """Whether it is there and undamaged."""
        folder = self.root / kind / signature
        if folder not in self._whole and folder.is_dir() and damaged(folder) is None:
            self._whole.add(folder)
        return folder in self._whole and folder.is_dir()

    def folder(self, kind: str, signature: str, make: Callable[[Path], None]) -> Path:
        """The folder of that signature, which ``make(empty folder)`` fills if it is missing or damaged, and says so."""
        if not self.has(kind, signature):
            with self._locked(kind, signature):
                self._make_if_missing(kind, signature, make)
        return self.root / kind / signature

    def _locked(self, kind: str, signature: str) -> AbstractContextManager[None]:
        return locked(self.root / kind / f"{signature}.lock", f"{kind} {signature[:8]}")

    def offer(self, kind: str, signature: str, make: Callable[[Path], None]) -> None:
        """Makes it, unless it is there or another process is at it."""
        with _locked_if_free(self.root / kind / f"{signature}.lock") as free:
            if free:
                self._make_if_missing(kind, signature, make)

    def _make_if_missing(self, kind: str, signature: str, make: Callable[[Path], None]) -> None:
        """For the lock's holder: it may have been made meanwhile. What is there else, damage or a kill left."""
        final, partial = self.root / kind / signature, self.root / kind / f"{signature}.partial"
        if self.has(kind, signature):
            return
        wrong = damaged(final) if final.is_dir() else None
        if wrong:
            print(f"damaged: {final} ({wrong}); it is made again", file=sys.stderr, flush=True)
        for path in (partial, final):
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            make(partial)
            write_sums(partial, sums_of(sorted(path for path in partial.rglob("*") if path.is_file())))
            partial.rename(final)
        except SafetensorError as error:  # of a full disk it makes no OSError
            raise OSError(f"cannot write {final}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._whole.add(final)
        self.made.add(final)
        launch.count(kind)

    def forget(self, kind: str, *signatures: str) -> None:
        for signature in signatures:
            folder = self.root / kind / signature
            self._whole.discard(folder)
            with self._locked(kind, signature):
                shutil.rmtree(folder, ignore_errors=True)

    def forget_parts(self, kind: str, signature: str) -> None:
        """Of an artefact that is whole: folders named after its signature, a dash and a number."""
        with self._locked(kind, signature):
            for path in (self.root / kind).glob(f"{signature}-[0-9]*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def cells(self, kind: str, signature: str) -> Cells:
        return Cells(self.root / kind / signature)


@contextmanager
def _locked_if_free(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Holds the lock file, or yields False, since another process does, and has for so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(timeout=patience)
    except Timeout:
        yield False
        return
    with lock:
        yield True


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file; that it waits for another process is printed."""
    with _locked_if_free(path, PATIENCE if launch.processes() > 1 else 0.0) as free:
        if free:
            yield
            return
    print(f"waiting for another process, which makes {what}", file=sys.stderr, flush=True)
    with FileLock(path):
        yield


def damaged(folder: Path) -> str | None:
    """What is wrong with a folder of the cache, if anything."""
    try:
        sums = read_sums(folder)
        for path, expected in sums.items():
            if sum_of_file(path) != expected:
                return f"{path.relative_to(folder)} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None if sums else "it lists no files"


class Cells:
    """Finished pieces by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Any | None:
        """The value; None where there is none, or a damaged file, which is reported and removed."""
        path = self.folder / f"{name}.json"
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            if cell["sha256"] == _sum_of(cell["value"]):
                return cell["value"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        print(f"damaged: {path}; it is measured again", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        return None

    def put(self, name: str, value: Any) -> None:
        value = json.loads(json.dumps(value))  # as it will be read
        cell = {"sha256": _sum_of(value), "value": value}
        write_atomic(self.folder / f"{name}.json", json.dumps(cell) + "\n")

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """From the cell of that name, or measured now, by one process at a time, and put there."""
        return self.shared([name], lambda _: [measure()], itertools.repeat(1))[name]

    def offer(self, name: str, measure: Callable[[], Any]) -> None:
        """Measures it, unless it is known or another process is at it."""
        with self._claimed([name], 1) as mine:
            for each in mine:
                self._put_new(each, measure())

    def shared(
        self, names: Sequence[str], measure: Callable[[list[str]], list[Any]], sizes: Iterator[int]
    ) -> dict[str, Any]:
        """The cells of these names; those that are not known are measured, several at a time, as many as ``sizes``
        says. Processes that do the same side by side share the work: each takes what no other is at."""
        found = {name: self.get(name) for name in names}
        while left := [name for name in found if found[name] is None]:
            with self._claimed(left, next(sizes)) as mine:
                for name, value in zip(mine, measure(mine) if mine else [], strict=True):
                    self._put_new(name, value)
            if not mine:
                with locked(self.folder / f"{left[0]}.lock", left[0]):
                    pass
            found |= {name: self.get(name) for name in left}
        return found

    def forget(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def _put_new(self, name: str, value: Any) -> None:
        self.put(name, value)
        launch.count(self.folder.parent.name)

    @contextmanager
    def _claimed(self, names: Sequence[str], most: int) -> Iterator[list[str]]:
        """The first that are not known and not being measured by another process, locked."""
        with ExitStack() as held:
            mine: list[str] = []
            for name in names:
                if len(mine) == most:
                    break
                with ExitStack() as one:
                    free = one.enter_context(_locked_if_free(self.folder / f"{name}.lock"))
                    if free and self.get(name) is None:  # else it was measured meanwhile
                        mine.append(name)
                        held.push(one.pop_all())
            yield mine


def _sum_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
