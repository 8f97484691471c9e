"""A sweep's table: from results as a run writes them, and nothing that cannot be compared."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import write_table
from wanquant.evaluate.stats import Item, estimate
from wanquant.runs.run import SCHEMA, Run

BEGIN, END = "<!-- table T: begin -->", "<!-- table T: end -->"
ITEMS = [Item(prompt, seed, 20.0 + seed) for prompt in ("a", "b") for seed in range(10)]
METRIC = estimate(ITEMS).as_json()
RESULT: dict[str, Any] = {
    "schema": SCHEMA,
    "status": "ok",
    "error": None,
    "demonstration": False,
    "model": {"name": "tiny", "fingerprint": "f", "outliers": [], "octaves": 28, "batch": 24},
    "quant": {
        "name": "hif8_w8a8", "weights": {"granularity": "per_channel", "rule": "amax/15"},
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
            "": ("latent_sqnr", "psnr", "ssim", "attributes"),
            "floor_ulp.": ("latent_sqnr", "psnr", "ssim"),
            "bf16.": ("attributes",),
        }.items()
        for name in names
    },
    "gates": {"black": {"verdict": "pass"}, "static": {"verdict": "fail"}},
    "provenance": {
        "prompts": ["a", "b"], "seeds": list(range(10)), "packages": {"torch": "2"}, "device": "cpu", "threads": 2,
        "instructions": [], "git_commit": None, "dirty": None, "version": "0", "prompt_hash": "0123456789abcdef",
    },
}  # fmt: skip


def sweep(folder: Path, *changes: dict[str, Any]) -> Path:
    """A sweep of one run as above and one for each dict of changes to it, by dotted key."""
    for number, change in enumerate(({}, *changes)):
        result = copy.deepcopy(RESULT)
        for path, value in change.items():
            *parents, leaf = path.split(".")
            place = result
            for parent in parents:
                place = place[parent]
            place[leaf] = value
        (folder / str(number)).mkdir()
        (folder / str(number) / "result.json").write_text(json.dumps(result))
    return folder


def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, write_table.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_holds_each_run_and_the_floor(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    folder = tmp_path / "sweep"
    folder.mkdir()
    sweep(folder, {"protect.name": "ends", "protect.blocks": [0, 39], "conversion.converted": 380})
    done = run(folder, "T", readme)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| protect |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| `", "| *"))]
    assert [row.split("|")[1].strip() for row in rows] == ["`none`", "`ends`", "*BF16, noise moved by 1 ulp*"]
    assert "| 98.7 % | 24.50 [24.50, 24.50] |" in rows[0]
    assert rows[0].endswith("| FAILED: static |")
    assert "| 0, 39 |" in rows[1]
    assert "| 24.50 [24.50, 24.50] | 0.000 [0.000, 0.000] |" in rows[1]
    assert "20 (prompt, seed) pairs" in text
    assert "400 with `none`, 380 with `ends`" in text


def test_a_sweep_over_quantizations_is_a_table_of_them(tmp_path: Path) -> None:
    """The differences are those of the pairs: one better by one in every second pair, half a decibel better."""
    better = copy.deepcopy(METRIC)
    for item in better["per_item"]:
        item["value"] += item["seed"] % 2
    static = {"granularity": "per_tensor", "rule": "p99.99/15", "static": True}
    changes = {"quant.name": "percentile", "quant.activations": static, "metrics.latent_sqnr": better}
    results, by = write_table.read_sweep(sweep(tmp_path, {**changes, "quant.smoothing": 0.5}))
    assert by == "quant"
    rows = [line.split(" | ") for line in write_table.table(results, by).splitlines() if line.startswith("| `")]
    assert rows[0][:3] == ["| `hif8_w8a8`", "per channel, amax/15", "per token, amax/15"]
    assert rows[1][:3] == ["| `percentile`", "per channel, amax/15", "static per tensor, p99.99/15, smoothed 0.5"]
    assert rows[0][4] == ""
    assert rows[1][4] == "0.500 [0.500, 0.500]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"demonstration": True}, "too few"),
        ({"provenance.threads": 3}, "differs from .* in provenance.threads"),
        ({"generation.steps": 30}, "differs from .* in generation"),
        ({"schema": 0}, "has schema 0"),
        ({"provenance.dirty": True}, "differs from .* in provenance.dirty"),
        ({}, "two runs with protect=none"),
        ({"quant.name": "pow2", "protect.blocks": [1]}, "differs from .* in protect.blocks"),
        ({"quant.weights": {}}, "differs from .* in quant"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_table.read_sweep(sweep(tmp_path, change))


def test_an_analysis_is_a_table_of_its_blocks(tmp_path: Path) -> None:
    """The most sensitive first, what is not finite before that."""
    result = copy.deepcopy(RESULT)
    blocks = [
        {
            "block": block, "few_bits": 0.25, "residual_absmax": 120.0, "input_absmax": 8.0,
            **{f"{name}{end}": value for name in ("sensitivity", "block_sqnr") for end in ("", "_low", "_high")},
        }
        for block, value in enumerate((30.0, 20.0, None))
    ]  # fmt: skip
    correlation = [{"measure": "m", "meaning": "a measure", "spearman": 0.5, "ci95": [0.25, 0.75]}]
    result |= {"mode": "analyze", "analysis": {"blocks": blocks, "correlation": correlation}}
    result["calibration"]["pairs"] = 20
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = write_table.write(tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| 2", "| 1", "| 0"]
    assert rows[0][1] == "– [–, –]"
    assert rows[1][1:] == ["20.00 [20.00, 20.00]", "20.00 [20.00, 20.00]", "120", "8", "25.0 % |"]
    assert "a measure: 0.5 [0.25, 0.75]" in text
    result["mode"] = "quantize"
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="not a finished analysis"):
        write_table.write(tmp_path)


def test_a_failed_run_is_said_to_have_failed(tmp_path: Path) -> None:
    Run(sweep(tmp_path) / "1", "ptq", "").fail(ValueError("out of luck"))
    with pytest.raises(ValueError, match="1 failed: ValueError: out of luck"):
        write_table.read_sweep(tmp_path)


def test_a_run_with_videos_alone_is_marked(tmp_path: Path) -> None:
    results, by = write_table.read_sweep(sweep(tmp_path, {"quant.name": "osp_next", "model.batch": 1}))
    rows = [line for line in write_table.table(results, by).splitlines() if line.startswith("| `")]
    assert rows[1].startswith("| `osp_next` (videos one at a time) |")
    assert "one at a time" not in rows[0]


def test_an_empty_sweep_and_a_readme_without_markers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no runs"):
        write_table.read_sweep(tmp_path)
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "sweep").mkdir()
    done = run(sweep(tmp_path / "sweep"), "T", tmp_path / "README.md")
    assert done.returncode == 2
    assert "must hold" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
