"""Pages and texts from templates. A page is one file that opens anywhere without a network: all is data inside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from wanquant.runs.reports.columns import ATTRIBUTES, estimate_text, short
from wanquant.runs.reports.table import Table


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("wanquant.runs.reports"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate_text, "short": short, "lines": _lines, "settings": _settings}
    environment.globals["ATTRIBUTES"] = ATTRIBUTES
    return environment


def render(name: str, **values: Any) -> str:
    """The template ``<name>.j2`` with these values, which are escaped where it is HTML."""
    return _environment().get_template(f"{name}.j2").render(**values)


def _lines(table: Table, right: Collection[int] = ()) -> str:
    return "\n".join(table.lines(right))


def _settings(result: dict[str, Any], keys: Iterable[str]) -> str:
    return json.dumps({key: result[key] for key in keys}, indent=2)


def data_uri(content: bytes | Path, kind: str) -> str:
    data = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def films(captioned: Iterable[tuple[str, Path]], most: int) -> list[tuple[str, str]]:
    """(caption, data) of videos as long as they hold no more than ``most`` bytes together."""
    found, size = [], 0
    for caption, path in captioned:
        size += path.stat().st_size
        if size > most:
            break
        found.append((caption, data_uri(path, "video/mp4")))
    return found
