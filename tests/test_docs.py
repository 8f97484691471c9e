"""The page that lists the configuration lists all of it, and nothing that is gone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanquant.config import SCHEMAS
from wanquant.evaluate.gates import GATES, REFERENCE_GATES
from wanquant.formats.registry import FORMATS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def keys_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each key with its field."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{path}{each.name}.")
        else:
            yield path + each.name, each


def listed() -> dict[str, str]:
    """Key to what is said of it."""
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key: said for keys, said in rows for key in re.findall(r"`([^`]+)`", keys)}


def test_every_key_is_explained_and_no_other() -> None:
    known = {key: each for schema in SCHEMAS.values() for key, each in keys_of(schema())}
    said = listed()
    assert set(said) == set(known)
    for key, each in known.items():
        missing = [word for word in each.metadata.get("choices", ()) if f"`{word}`" not in said[key]]
        assert not missing, f"{key}: {missing}"
    assert all(f"`{name}`" in said["quant.format"] for name in FORMATS)


def test_every_gate_stands_in_the_documentation_with_its_threshold() -> None:
    page = PAGE.with_name("evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (above|below) ([0-9.]+) \|", page, re.MULTILINE)
    assert rows == [(gate.name, gate.bad_if, f"{gate.threshold:g}") for gate in (*GATES, *REFERENCE_GATES)]
