"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

#: Sums of the files of a folder, as ``sha256sum --check`` reads them.
SUMS = "SHA256SUMS"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name to write to; renamed to ``path`` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name: two processes may write the same file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder of a temporary name to write to; renamed to ``folder`` at the end, removed after an
    error."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sum_of_file(path: Path) -> str:
    """SHA-256 of its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(files: Iterable[Path], on_file: Callable[[], None] = lambda: None) -> dict[Path, str]:
    """Several at a time: one thread sums slower than a disk reads."""
    found = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, sum_ in pool.map(lambda path: (path, sum_of_file(path)), files):
            found[path] = sum_
            on_file()
    return found


def write_sums(folder: Path, sums: Mapping[Path, str]) -> None:
    """``SHA256SUMS`` of these files of the folder."""
    lines = [f"{sum_}  {path.relative_to(folder).as_posix()}\n" for path, sum_ in sums.items()]
    write_atomic(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[Path, str]:
    """What ``write_sums`` wrote; ``ValueError`` names the line that is none of its."""
    found = {}
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8").splitlines(), 1):
        told = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if told is None:
            raise ValueError(f"{folder / SUMS}, line {number}: not a SHA-256 sum and the name of a file")
        found[folder / told[2]] = told[1]
    return found


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Two names for one file where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_atomic(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
