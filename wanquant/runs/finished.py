"""What is finished is not run again: a run of the same signature is taken over, from the same folder or another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanquant.runs.cache import Cache, locked
from wanquant.runs.files import link_or_copy
from wanquant.runs.run import PRODUCTS, Run, digest, read_result

KIND = "finished"


@contextmanager
def in_use(cache_root: Path, folder: Path) -> Iterator[None]:
    """The run directory is this process's alone."""
    name = digest(str(folder.resolve()))[:16]
    with locked(cache_root / "runs" / f"{name}.lock", str(folder)):
        yield


def note_finished(cache: Cache, asked: str, folder: Path) -> None:
    """Remembers that ``folder`` answers the signature ``asked``."""
    cache.cells(KIND, asked[:2]).put(asked, {"folder": str(folder.resolve())})


def find_finished(cache: Cache, asked: str, folder: Path, wanted: dict[str, Any]) -> Path | None:
    """A folder in which a finished run answers ``asked``, if it is still there and whole: ``folder`` itself, or the one
    noted. ``wanted`` are things that change no number but have to be as asked: frames a second, and with a checkpoint
    how that is packed (absent: no checkpoint needed)."""
    cell = cache.cells(KIND, asked[:2]).get(asked)
    for place in (folder, *([Path(cell["folder"])] if cell else [])):
        try:
            result = read_result(place)
        except (ValueError, OSError):
            continue
        if result["status"] == "ok" and result.get("asked") == asked and _as_wanted(place, result, wanted):
            return place
    return None


def _as_wanted(folder: Path, result: dict[str, Any], wanted: dict[str, Any]) -> bool:
    if result["generation"]["fps"] != wanted["fps"]:
        return False
    if "packed" not in wanted or not result.get("conversion", {}).get("converted"):
        return True
    return (folder / "checkpoint").is_dir() and result["quant"]["packed"] == wanted["packed"]


def take_over(
    run: Run, source: Path, names: dict[str, dict[str, Any]], with_checkpoint: bool, kept: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of the finished run in ``source`` for ``run``, under the names asked for now; its files are linked
    where the disk can, else copied. ``kept`` are evaluations that are in the folder of ``run`` already."""
    result = read_result(source)
    result.pop("not_judged", None)  # there, by whoever asked for it there
    for name in PRODUCTS:
        if kept and name == "evaluations":
            result["evaluations"] = kept
        elif (source / name).is_dir() and (with_checkpoint or name != "checkpoint"):
            partial = run.folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial, copy_function=link_or_copy)
            partial.rename(run.folder / name)
    print(f"finished already, in {source}{by(result)}: taken over; force=true runs it again", flush=True)
    renamed = {group: {**result[group], **given} for group, given in names.items()}
    return {**result, **renamed, "provenance": {**result["provenance"], "taken_from": str(source)}}


def by(result: dict[str, Any]) -> str:
    """Which state of the code made it: the signature knows it by its content only."""
    made = result["provenance"]
    commit = made["git_commit"]
    return f" (by commit {commit[:8]}{' with changes' if made['dirty'] else ''})" if commit else ""
