"""The report of ``mode=convert``: what was read and written, and how the prediction fared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment


def convert_html(environment: Environment, result: dict[str, Any]) -> str:
    settings = {key: result[key] for key in ("quant", "protect", "convert", "provenance")}
    return environment.get_template("convert.html.j2").render(
        result=result, rows=rows_of(result), settings=json.dumps(settings, indent=2)
    )


def rows_of(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What, predicted, measured, and their ratio."""
    told, memory = result["convert"], result["memory"]
    lines = [
        ("weights written, GB", told["planned_bytes"] / 1e9, told["written_bytes"] / 1e9),
        ("peak memory, GB", memory["planned_bytes"] / 1e9, memory["peak_bytes"] / 1e9),
        ("time, s", told["planned_seconds"], result["timings"]["convert"]),
    ]
    return [(what, f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}") for what, a, b in lines]


def convert_summary(result: dict[str, Any], folder: Path) -> str:
    told, counts, seconds = result["convert"], result["conversion"], result["timings"]["convert"]
    lines = [
        "",
        f"{result['quant']['name']} on {result['model']['name']}, protect {result['protect']['name']}: "
        + ", ".join(f"{counts[status]} linears {status}" for status in counts),
        f"{told['read_bytes'] / 1e9:.2f} GB read, {told['written_bytes'] / 1e9:.2f} GB written "
        f"({told['written_bytes'] / told['read_bytes']:.3f} of it) in {seconds:.0f} s, "
        f"{told['read_bytes'] / 1e9 / max(seconds, 1e-3):.2f} GB/s",
        "",
        f"{'':<24}{'predicted':>12}{'measured':>12}{'ratio':>8}",
    ]
    lines += [f"{what:<24}{a:>12}{b:>12}{ratio:>8}" for what, a, b, ratio in rows_of(result)]
    if result["overflow"]["elements"]:
        overflow = result["overflow"]
        lines += [
            "",
            f"overflow: {overflow['elements']:,} weights in {len(overflow['modules'])} linears left the range",
        ]
    return "\n".join([*lines, "", f"checkpoint: {told['checkpoint']}", f"report: {folder / 'report.html'}"])
