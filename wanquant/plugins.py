"""Formats, scale rules, protection rules, metrics and model families from outside the package.

A plug-in is a module that calls ``register_format``, ``register_scale_rule``, ``register_protection``,
``register_metric`` or ``register_family`` when it is imported (docs/architecture.md). The programs import those that
installed packages name under the entry point group ``wanquant``, and the modules in ``WANQUANT_PLUGINS`` (comma
between), before a config's values are checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points

GROUP, VARIABLE = "wanquant", "WANQUANT_PLUGINS"


@cache
def load_plugins() -> tuple[str, ...]:
    """The modules that were imported. ``ValueError`` names one that cannot be."""
    wanted: dict[str, Callable[[], object]] = {entry.value: entry.load for entry in entry_points(group=GROUP)}
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        wanted[name] = partial(import_module, name)
    for name, load in wanted.items():
        try:
            load()
        except ImportError as error:
            raise ValueError(f"the plug-in {name} cannot be imported: {error}") from error
    return tuple(wanted)
