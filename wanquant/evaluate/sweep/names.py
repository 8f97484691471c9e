"""Which runs may stand in one table, and what tells them apart there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: What a sweep may vary, and by what its runs are equal otherwise.
VARIED = {"quant": ("quant",), "protect": ("protect.blocks", "protect.modules"), "qat": ("qat",)}
#: What runs must share to stand in one table.
SAME = (
    *("mode", "demonstration", "generation", "model.fingerprint", "model.outliers", "model.octaves"),
    *("eval", "calibration.videos", "calibration.input_absmax"),
    *(f"provenance.{key}" for key in ("prompts", "seeds", "packages", "device", "threads", "instructions", "version")),
    *("provenance.bf16_products", "provenance.device_name"),
)


def refuse_incomparable(runs: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """``ValueError`` names what keeps two runs from standing in one table."""
    first_folder, first = runs[0]
    for folder, result in runs[1:]:
        for path in SAME:
            if pick(result, path) != pick(first, path):
                raise ValueError(f"{folder} differs from {first_folder} in {path}: not one table")


def pick(result: dict[str, Any], path: str) -> Any:
    """By dotted key; an empty dict where there is nothing."""
    for key in path.split("."):
        result = result.get(key, {})
    return result


def varied(results: Sequence[dict[str, Any]]) -> list[str]:
    """The groups in which the runs differ by name; the protection if in none."""
    found = [group for group in VARIED if len({pick(result, f"{group}.name") or "" for result in results}) > 1]
    return found or ["protect"]


def names_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the runs apart: the names of the groups in which they differ, and where those are the same the
    settings that are not (``distill, qat.lr=0.0001``); ``ValueError`` if nothing does."""
    groups = varied(results)
    parts = [[result[group]["name"] for group in groups] for result in results]
    for group, paths in VARIED.items():
        settings = [
            dict(item for path in paths for item in settings_below(pick(result, path), path)) for result in results
        ]
        told = [str(pick(result, f"{group}.name")) for result in results]
        whole = [", ".join(part) for part in parts]
        for key in sorted({key for each in settings for key in each}):
            for place, each in enumerate(settings):
                alike = [
                    settings[other].get(key)
                    for other in range(len(results))
                    if told[other] == told[place] and (group not in groups or whole[other] == whole[place])
                ]
                if any(value != each.get(key) for value in alike):
                    parts[place].append(f"{key}={each.get(key)}")
    names = [", ".join(part) for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the sweep holds two runs of {twice[0]}")
    return names


def settings_below(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All that can be set below a key, by its whole key; what only names it left out."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        if name not in ("name", "by_language"):
            yield from settings_below(inner, f"{key}.{name}")
