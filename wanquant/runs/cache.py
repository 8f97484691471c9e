"""Artefacts that several runs share, each in a folder named by its signature.

A folder is written under a temporary name and renamed when whole, so whoever finds it can use it; of two processes
that make the same one, the first to finish wins and the other's is thrown away. ``cells`` are folders that grow:
one small JSON file for each finished piece of a long measurement, so that it can be stopped and taken up again.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanquant.runs.files import write_atomic


class Cache:
    """Below ``root``: ``<kind>/<signature>/``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, kind: str, signature: str) -> bool:
        return (self.root / kind / signature).is_dir()

    def folder(self, kind: str, signature: str, make: Callable[[Path], None]) -> Path:
        """The folder of that signature, made by ``make(empty folder)`` if it is not there yet."""
        final = self.root / kind / signature
        if final.is_dir():
            return final
        partial = final.with_name(f"{signature}.partial-{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        try:
            make(partial)
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def cells(self, kind: str, signature: str) -> Cells:
        return Cells(self.root / kind / signature)


class Cells:
    """Finished pieces by name; a damaged file counts as not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Any | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, name: str, value: Any) -> None:
        write_atomic(self.folder / f"{name}.json", json.dumps(value) + "\n")
