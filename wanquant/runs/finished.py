"""What is finished is not run again: a run of the same signature is taken over, from the same folder or another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanquant.runs.cache import Cache
from wanquant.runs.run import PRODUCTS, Run, read_result, write_result

KIND = "finished"


def note_finished(cache: Cache, asked: str, folder: Path) -> None:
    """Remembers that ``folder`` answers the signature ``asked``."""
    result = read_result(folder)
    cache.cells(KIND, asked[:2]).put(asked, {"folder": str(folder.resolve()), "signature": result["signature"]})


def find_finished(cache: Cache, asked: str, with_checkpoint: bool) -> Path | None:
    """The folder of a finished run that was asked the same, if it is still there and whole."""
    cell = cache.cells(KIND, asked[:2]).get(asked)
    if cell is None:
        return None
    folder = Path(cell["folder"])
    try:
        result = read_result(folder)
    except ValueError:
        return None
    if result["status"] != "ok" or result["signature"] != cell["signature"]:
        return None
    if with_checkpoint and result["conversion"]["converted"] and not (folder / "checkpoint").is_dir():
        return None
    return folder


def take_over(
    source: Path,
    folder: Path,
    config_yaml: str,
    names: dict[str, dict[str, Any]],
    publish: Callable[[Path, dict[str, Any]], object],
) -> dict[str, Any]:
    """The result of the finished run in ``source`` as that of ``folder``, under the names asked for now: files are
    linked where the disk can, else copied. ``publish(folder, result)`` draws the report."""
    result = read_result(source)
    here = source.resolve() == folder.resolve()
    renamed = {**result, **{group: {**result[group], **given} for group, given in names.items()}}
    if here and renamed == result:
        print(f"finished already: {folder}{_by(result)}; force=true runs it again", flush=True)
        return result
    if not here:
        Run(folder, result["job"], config_yaml, names)
        for name in PRODUCTS:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name, copy_function=_link_or_copy)
        renamed["provenance"] = {**result["provenance"], "taken_from": str(source)}
    publish(folder, renamed)
    write_result(folder, renamed)
    print(f"finished already, in {source}{_by(result)}: taken over into {folder}; force=true runs it again", flush=True)
    return renamed


def _by(result: dict[str, Any]) -> str:
    """Which state of the code made it: the signature does not ask."""
    made = result["provenance"]
    commit = made["git_commit"]
    return f" (by commit {commit[:8]}{' with changes' if made['dirty'] else ''})" if commit else ""


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
