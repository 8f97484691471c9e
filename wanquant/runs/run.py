"""A run: its directory, its timings, and ``result.json``, which is the truth.

Everything is written to a temporary name and renamed, so that a killed run leaves nothing that
looks complete. Numbers that are not finite become null: JSON has no other word for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from wanquant.runs.files import write_atomic

#: Of ``result.json``, and of what its numbers mean: part of every signature.
SCHEMA = 5
#: First line of a run's ``config.yaml``, by which a directory is known to be one.
HEADER = "# A wanquant run: the resolved config.\n"
#: Config keys that cannot change a number, and are left out of the signature; ``*`` is any group.
VOLATILE = (
    "tracker",
    "cache",
    "dry_run",
    "force",
    "verify",
    "checkpoint",
    "quant.packed",
    "model.device",
    "model.offload",
    "model.path",
    "model.base",
    "model.lora",
    "model.lora_fuse",
    "model.generation.fps",
    "eval.dimensions",
    "eval.foreign_weights",
    "*.name",
    "*.by_language",
)
#: Folders a run makes beside its summaries.
PRODUCTS = ("checkpoint", "videos", "figures", "analysis", "evaluations")
#: By which a directory is known to hold a finished run.
SUMMARIES = ("result.json", "report.html")


def clean_json(value: Any) -> Any:
    """The value with tuples as lists and numbers that are not finite as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): clean_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(clean_json(value), sort_keys=True).encode()).hexdigest()


def remove_products(folder: Path, keep: Sequence[str] = ()) -> None:
    """Removes an earlier run's results and what a killed run left, except the products in ``keep``."""
    summaries = [path for name in SUMMARIES for path in (folder / name, _previous(folder / name))]
    made = [folder / f"{name}{end}" for name in PRODUCTS if name not in keep for end in ("", ".partial")]
    for path in (*summaries, *made, *_unfinished(folder)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _unfinished(folder: Path) -> list[Path]:
    """Files that a killed run was writing."""
    return list(folder.glob("*.tmp")) if folder.is_dir() else []


@contextmanager
def refused_leave_no_result(folder: Path) -> Iterator[None]:
    """For the checks before a run. If they refuse it, an earlier run's result in this directory, which would look
    like this one's, gets the name ``result.previous.json``; nothing of it is lost."""
    refuse_foreign(folder)
    try:
        yield
    except Exception:
        for name in SUMMARIES:
            path = folder / name
            if path.is_file():
                path.replace(_previous(path))
        raise


def _previous(path: Path) -> Path:
    return path.with_suffix(f".previous{path.suffix}")


def refuse_foreign(folder: Path) -> None:
    """``ValueError`` for a directory that holds anything but a run: nothing of a user's is ever removed."""
    if not folder.is_dir():
        return
    present = {path.name for path in folder.iterdir()} - {"log.txt"} - {path.name for path in _unfinished(folder)}
    config = folder / "config.yaml"
    if present and not (config.is_file() and config.read_text().startswith(HEADER)):
        raise ValueError(f"{folder} is neither empty nor a run directory: choose another hydra.run.dir")


class Run:
    """One job in its directory. ``stage`` times a part of it; ``finish`` or ``fail`` ends it."""

    def __init__(
        self, folder: Path, job: str, config_yaml: str, names: dict[str, Any] | None = None, keep: Sequence[str] = ()
    ) -> None:
        """``names`` are those of the model, the quantization and the protection, which a failed run's result has too;
        ``keep`` are products of an earlier run that belong to this one as well."""
        self.folder = folder
        self.job = job
        self.names = names or {}
        self.timings: dict[str, float] = {}
        self.started = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign(folder)
        remove_products(folder, keep)
        write_atomic(folder / "config.yaml", HEADER + config_yaml)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - begun

    def finish(self, result: dict[str, Any], publish: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Writes ``result.json`` with status ok, after ``publish`` drew what is drawn from it; returns it."""
        full = self._full("ok", None, result)
        publish(full)
        write_result(self.folder, full)
        return full

    def fail(self, error: BaseException) -> None:
        """Writes ``result.json`` with status failed and the traceback to ``log.txt``.

        Whatever looks like a result is removed first. A disk too full even for that leaves none.
        """
        remove_products(self.folder)
        try:
            with (self.folder / "log.txt").open("a") as log:
                traceback.print_exception(error, file=log)
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            message = "interrupted" if stopped else f"{type(error).__name__}: {error}"
            write_result(self.folder, self._full("failed", message, self.names))
        except OSError:
            (self.folder / "result.json").unlink(missing_ok=True)

    def _full(self, status: str, error: str | None, result: dict[str, Any]) -> dict[str, Any]:
        timings = result.get("timings", {**self.timings, "total": time.time() - self.started})
        head = {"schema": SCHEMA, "job": self.job, "status": status, "error": error}
        full: dict[str, Any] = clean_json({**head, **result, "timings": timings})
        return full


def failed_result(error: str, job: str = "", names: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is left of a run that was refused, or cannot be read."""
    return {"schema": SCHEMA, "job": job, "status": "failed", "error": error, **(names or {})}


def write_refusal(folder: Path, job: str, config_yaml: str, names: dict[str, Any], error: str) -> None:
    """The result of a job of a sweep that was refused before it began, so that the sweep's table has it. An earlier
    run's result in the folder was put aside by ``refused_leave_no_result``."""
    refuse_foreign(folder)
    write_atomic(folder / "config.yaml", HEADER + config_yaml)
    write_result(folder, failed_result(error, job, names))


def write_result(folder: Path, full: dict[str, Any]) -> None:
    write_atomic(folder / "result.json", json.dumps(full, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run directory."""
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config of a run")
    return config


def read_result(folder: Path) -> dict[str, Any]:
    """The ``result.json`` of a run directory; ``ValueError`` says what is wrong with it."""
    path = folder / "result.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no result.json: the run was not finished")
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path} holds a {type(result).__name__}, not an object")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {result.get('schema')}, this version reads {SCHEMA}")
    return result
