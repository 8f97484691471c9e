"""Statistics as files: ``statistics.safetensors`` for the figures, ``statistics.json`` for what they are of.

Histograms are stored without the empty bins at their ends, as the smallest unsigned integers that hold them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from wanquant.kernels.observe_loop import LOWEST, PER_OCTAVE
from wanquant.kernels.statistics import BINS, DYNAMIC_RULES, HIGHEST
from wanquant.quant.statistics import Layout, Site, Statistics

#: Of the two files; other versions are not read.
VERSION = 2
#: What the arrays mean: statistics with other bins or rules are other statistics.
KIND = {
    "version": VERSION,
    "histogram": {"bins_per_octave": PER_OCTAVE, "lowest": LOWEST, "highest": HIGHEST},
    "rules": [rule.name for rule in DYNAMIC_RULES],
}
ARRAYS, DESCRIPTION = "statistics.safetensors", "statistics.json"


def save_statistics(statistics: Statistics, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Writes both files into ``folder``, which exists; ``about`` goes into the JSON as it is."""
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, int] = {}
    for name, site in statistics.sites.items():
        for field in fields(Site):
            arrays[f"{name}/{field.name}"] = getattr(site, field.name)
        arrays[f"{name}/counts"], first[name] = _trimmed(site.counts)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS)
    description = {
        **KIND,
        "layout": asdict(statistics.layout),
        "coverage": statistics.coverage(),
        "first_bin": first,
        "about": about or {},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def load_statistics(folder: Path) -> Statistics:
    """What ``save_statistics`` wrote, bit for bit; ``ValueError`` for files of another version or damaged ones."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        for key, value in KIND.items():
            if described[key] != value:
                raise ValueError(f"{key} {described[key]}, this program reads {value}")
        arrays = load_file(folder / ARRAYS)
        layout = Layout(**{**described["layout"], "videos": tuple(described["layout"]["videos"])})
        sites = {}
        for name, first in described["first_bin"].items():
            found = {field.name: arrays[f"{name}/{field.name}"] for field in fields(Site)}
            found["counts"] = _widened(found["counts"], first)
            sites[name] = Site(**found)
    except Exception as error:  # safetensors, json, a missing key: whatever is wrong, they cannot be used
        raise ValueError(f"cannot read the statistics in {folder}: {error}") from error
    return Statistics(layout, sites)


def _trimmed(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """The part between the first and the last bin that is not empty, and the number of its first."""
    used = np.flatnonzero(counts.sum((0, 1)))
    if not len(used):
        return counts[..., :0].astype(np.uint8), 0
    part = counts[..., used[0] : used[-1] + 1]
    return part.astype(np.min_scalar_type(part.max())), int(used[0])


def _widened(part: np.ndarray, first: int) -> np.ndarray:
    counts = np.zeros((*part.shape[:2], BINS), np.int64)
    counts[..., first : first + part.shape[2]] = part
    return counts
