"""Analysis, sensitivities and protection by data, also with planted outliers, at two denoising steps."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.jobs import ROOT, TWO, TWO_STEPS, ptq, short
from wanquant import load_pipeline
from wanquant.ptq.analyze import stand_out
from wanquant.ptq.protect import ProtectConfig, by_rule, check_protect, worst
from wanquant.ptq.sensitivity import all_but, quantized
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.statistics import Site, load_statistics, merge
from wanquant.runs.run import read_result

#: Two steps; and one calibration video.
SMALL = [*TWO_STEPS, "tracker=none"]
#: Blocks of tiny-wan that the outliers are planted in five of.
BLOCKS = 16
ONE = 'calib.texts=["a cyan square moving left on a black background"]'


def planted() -> list[str]:
    return ["model=tiny-outliers", f"model.path={short(BLOCKS)}"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_analysis_of_planted_outliers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    overrides = ["mode=analyze", *planted(), ONE, *SMALL, f"cache={cache}", f"hydra.run.dir={tmp_path}"]
    assert ptq(monkeypatch, *overrides) == 0
    result = read_result(tmp_path)
    there = result["model"]["outliers"]
    assert len(there) == 5
    rows = result["analysis"]["blocks"]
    largest = sorted(range(BLOCKS), key=lambda i: -rows[i]["input_absmax"])[:5]
    assert sorted(largest) == there
    assert set(there) <= {row["block"] for row in result["analysis"]["stand_out"] if row["measure"] == "input_absmax"}
    assert len(result["analysis"]["modules"]) == 10 * BLOCKS + 6
    assert np.array(result["analysis"]["heatmaps"]["inputs"]).shape == (BLOCKS, 2)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 6
    for name in ("blocks", "modules", "zones", "heatmap_stream", "heatmap_inputs"):
        table = (tmp_path / "analysis" / f"{name}.csv").read_text()
        embedded = re.search(rf'download="{name}.csv" href="data:text/csv;base64,([^"]+)"', html)
        assert embedded is not None
        assert base64.b64decode(embedded[1]).decode() == table
    statistics = load_statistics(tmp_path / "analysis")
    assert statistics.layout.steps == 2

    # Again: read from the cache, and the same.
    assert ptq(monkeypatch, *overrides, "force=true") == 0
    again = read_result(tmp_path)
    assert again["analysis"] == result["analysis"]
    assert again["provenance"]["from_cache"] == ["calibrate"]


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path: Path) -> None:
    prompts = [
        "a cyan square moving left on a black background",
        "a red triangle moving down on a white background",
    ]
    found = {}
    for name, texts in (("both", prompts), ("first", prompts[:1]), ("second", prompts[1:])):
        command = [sys.executable, "ptq.py", "mode=analyze", *SMALL, f"calib.texts={json.dumps(texts)}"]
        command += [f"cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = load_statistics(tmp_path / name / "analysis")
    merged = merge([found["first"], found["second"]])
    assert merged.layout == found["both"].layout
    for name, site in merged.sites.items():
        for field in fields(Site):
            ours, theirs = getattr(site, field.name), getattr(found["both"].sites[name], field.name)
            assert np.array_equal(ours, theirs, equal_nan=True), f"{name} {field.name}"


def test_blocks_chosen_by_data_are_protected_and_said_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    status = ptq(
        monkeypatch, "protect=auto", "protect.by=absmax", *planted(), TWO, ONE, *SMALL,
        "eval.noise_floor=false",
        f"cache={cache}", f"hydra.run.dir={tmp_path}", "checkpoint=false",
    )  # fmt: skip
    assert status == 0
    result = read_result(tmp_path)
    assert result["protect"]["blocks"] == result["model"]["outliers"]
    evidence = result["protect"]["chosen"]["evidence"]
    assert [row["block"] for row in evidence] == list(range(BLOCKS))
    assert result["conversion"]["protected"] == 50
    assert 0.6 < result["protect"]["fraction_of_flops_quantized"] < 0.7


@pytest.mark.slow
def test_smoothing_goes_through_the_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    status = ptq(
        monkeypatch,
        "quant=smooth",
        TWO,
        *SMALL,
        "eval.noise_floor=false",
        f"cache={cache}",
        f"hydra.run.dir={tmp_path}",
    )
    assert status == 0
    layer = load_pipeline(tmp_path / "checkpoint", "cpu").transformer.blocks[3].ffn.net[2]
    assert isinstance(layer, QuantLinear)
    assert layer.input_factor is not None
    exponents = layer.input_factor.log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.unique().numel() > 1
    assert layer.input_factor.dtype == torch.float32


def test_a_part_is_quantized_and_then_as_it_was() -> None:
    transformer = load_pipeline("tiny", "cpu").transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for unit, count in (("block 7", 10), ("kind ffn.net.2", 40)):
        with quantized(transformer, QuantConfig(), *all_but(transformer, unit)):
            layers = [name for name, child in transformer.named_modules() if isinstance(child, QuantLinear)]
            assert len(layers) == count
            assert all("blocks.7." in name or name.endswith("ffn.net.2") for name in layers)
        after = transformer.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_broken_block_stands_out_and_hides_no_other() -> None:
    blocks = [{"block": i, "block_sqnr": 30.0 + i % 3} for i in range(40)]
    blocks[7]["block_sqnr"], blocks[9]["block_sqnr"] = math.nan, 2.0
    rows = stand_out(blocks)
    assert [row["block"] for row in rows] == [7, 9]
    assert rows[1]["median"] == 31.0
    for block in blocks:
        block["block_sqnr"] = math.nan
    assert len(stand_out(blocks)) == 40


def test_rules_without_data() -> None:
    assert by_rule(ProtectConfig(by="middle", budget=5), 40) == [17, 18, 19, 20, 21]
    drawn = by_rule(ProtectConfig(by="random", budget=5, seed=1), 40)
    assert drawn == by_rule(ProtectConfig(by="random", budget=5, seed=1), 40) == sorted(set(drawn))
    assert drawn != by_rule(ProtectConfig(by="random", budget=5, seed=2), 40)
    assert worst([1.0, 5.0, float("nan"), 5.0], 2) == [1, 2]
    for wrong in (
        ProtectConfig(by="luck"),
        ProtectConfig(by="middle", budget=40),
        ProtectConfig(by="middle", blocks=[1]),
    ):
        with pytest.raises(ValueError, match=r"protect\."):
            check_protect(wrong, 40)
