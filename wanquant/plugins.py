"""Formats, scale rules, protection rules, metrics and model families from outside the package.

A plug-in is a module that calls ``register_format``, ``register_scale_rule``, ``register_protection``,
``register_metric`` or ``register_family`` when it is imported (docs/architecture.md). The programs import those that
installed packages name under the entry point group ``wanquant``, and the modules in ``WANQUANT_PLUGINS`` (comma
between), before a config's values are checked or a checkpoint's names are read. Their code is part of every signature.
"""

from __future__ import annotations

import hashlib
import os
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

GROUP, VARIABLE = "wanquant", "WANQUANT_PLUGINS"


def load_plugins() -> dict[str, str]:
    """By the name of each module the SHA-256 of its code. ``ValueError`` names one that cannot be imported or used."""
    found, problem = _load()
    if problem:
        raise ValueError(problem)
    return found


@cache
def _load() -> tuple[dict[str, str], str]:
    """Once in a process: a plug-in that failed half-way is not tried again."""
    names = [entry.module for entry in entry_points(group=GROUP)]
    names += filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(",")))
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # of somebody else's code
            return {}, f"the plug-in {name} cannot be imported: {type(error).__name__}: {error}"
    return {name: _sum_of(name) for name in names}, ""


def _sum_of(name: str) -> str:
    """Over its file, or over all Python files of the package that it is."""
    path = Path(sys.modules[name].__file__ or "")
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
