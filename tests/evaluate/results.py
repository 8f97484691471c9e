"""Results as a run writes them, for tests of what is drawn from many."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from wanquant.evaluate.stats import Item, estimate
from wanquant.runs.run import SCHEMA

ITEMS = [Item(prompt, seed, 20.0 + seed + (prompt == "b")) for prompt in ("a", "b", "c") for seed in range(8)]
METRIC = estimate(ITEMS).as_json()
GATE = {"verdict": "pass", "figure": 0.5, "threshold": 0.1, "bad_if": "below", "meaning": "brightness"}
RESULT: dict[str, Any] = {
    "schema": SCHEMA,
    "status": "ok",
    "error": None,
    "mode": "quantize",
    "demonstration": False,
    "model": {"name": "tiny", "fingerprint": "f", "outliers": [], "octaves": 28, "batch": 24},
    "quant": {
        "name": "hif8_w8a8", "format": "hif8", "weights": {"granularity": "per_channel", "rule": "amax/15"},
        "activations": {"granularity": "per_token", "rule": "amax/15", "static": False}, "smoothing": None,
    },
    "protect": {"name": "none", "blocks": [], "modules": [], "fraction_of_flops_quantized": 0.9871},
    "conversion": {"converted": 400, "protected": 0, "skipped": 6},
    "calibration": {"videos": 2, "input_absmax": {"a": 1.0}},
    "generation": {
        "steps": 20, "guidance_scale": 3.0, "flow_shift": 3.0, "num_frames": 17, "height": 64, "width": 64
    },
    "metrics": {
        prefix + name: METRIC
        for prefix, names in {
            "": ("step_sqnr", "latent_sqnr", "psnr", "ssim", "attributes", "difference.attributes"),
            "floor_ulp.": ("latent_sqnr", "psnr", "ssim"),
            "bf16.": ("attributes",),
        }.items()
        for name in names
    },
    "single_steps": {
        "step_sqnr": {
            "frames": 17, "sigma": [1.0, 0.5], "by_step": [{"mean": 20.0, "ci95": [19.0, 21.0]}] * 2,
            "by_branch": [{"mean": 20.0, "ci95": [19.0, 21.0]}] * 2,
        }
    },
    "gates": {"black": {**GATE}, "static": {**GATE}},
    "timings": {"total": 100.0},
    "provenance": {
        "prompts": ["a", "b", "c"], "seeds": list(range(8)), "packages": {"torch": "2"}, "device": "cpu", "threads": 2,
        "instructions": [], "git_commit": None, "dirty": None, "version": "0", "prompt_hash": "0123456789abcdef",
    },
}  # fmt: skip


def metric(values: dict[tuple[str, int], float]) -> dict[str, Any]:
    return estimate([Item(*pair, value) for pair, value in values.items()]).as_json()


def shifted(by: float, spread: float = 0.0) -> dict[str, Any]:
    """The pairs of ``ITEMS``, each better by so much, give or take what prompt it is of."""
    around = {"a": -spread, "b": 0.0, "c": spread}
    return metric({(item.prompt, item.seed): item.value + by + around[item.prompt] for item in ITEMS})


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """``RESULT`` with other values by dotted key."""
    result = copy.deepcopy(RESULT)
    for path, value in change.items():
        *parents, leaf = path.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    return result


def named(name: str, **change: Any) -> dict[str, Any]:
    return {"protect.name": name, **change}


def sweep(folder: Path, *changes: dict[str, Any]) -> Path:
    """A sweep of one run as above and one for each dict of changes to it."""
    for number, change in enumerate(({}, *changes)):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "result.json").write_text(json.dumps(changed(change)))
    return folder
