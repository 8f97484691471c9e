"""A sweep as a ranked table: what is compared, what is said of it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluate.results import METRIC, named, shifted, sweep
from wanquant.evaluate.stats import Estimate, Item, difference, estimate
from wanquant.evaluate.sweep import MANY_PAIRS, pairs_needed, summarize, verdict
from wanquant.runs.run import Run

SQNR = "metrics.latent_sqnr"


def between(low: float, high: float, mean: float | None = None, n: int = 24) -> Estimate:
    middle = (low + high) / 2 if mean is None else mean
    return Estimate(middle, low, high, tuple(Item("p", seed, middle) for seed in range(n)))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (between(-2, 1.5), "no difference found"),
        (between(-0.5, 0.9), "equivalent (within 1)"),
        (between(0.2, 0.9), "equivalent (within 1)"),
        (between(0.2, 1.9), "better"),
        (between(-3, -0.2), "worse"),
        (between(-1, 0.9), "no difference found"),
        (between(math.nan, math.nan, 1.0), "unknown"),
    ],
)
def test_verdicts(found: Estimate, said: str) -> None:
    assert verdict(found, margin=1.0) == said


def test_pairs_needed_resolve_the_difference_when_they_are_there() -> None:
    """Four times as wide as it may be: sixteen times the pairs. And with so many drawn, it is found about every second
    time, as it should be of an interval that would then just touch 0."""
    assert pairs_needed(between(-3.0, 5.0, mean=1.0)) == 24 * 16
    assert pairs_needed(between(-5.0, 3.0, mean=-1.0)) == 24 * 16
    assert pairs_needed(between(0.5, 1.5, mean=1.0)) == 6
    assert pairs_needed(between(-1.0, 1.0, mean=0.0)) == MANY_PAIRS
    assert pairs_needed(between(0.0, 0.0, mean=0.0)) is None
    rng, found = np.random.default_rng(0), 0
    trials, truth = 60, 0.5

    def drawn(prompts: int) -> Estimate:
        values = rng.normal(truth, 1.0, prompts)
        return estimate([Item(f"p{i}", 0, float(value)) for i, value in enumerate(values)])

    needed = math.ceil((1.96 / truth) ** 2)
    for _ in range(trials):
        found += drawn(needed).low > 0
    assert 0.3 < found / trials < 0.75
    typical = np.median([pairs_needed(drawn(60)) for _ in range(trials)])
    assert 0.5 * needed < typical < 2 * needed


def test_rows_are_ranked_and_compared_pair_by_pair(tmp_path: Path) -> None:
    """Means differ by far less than the prompts do, but every pair says the same."""
    changes = [named("better", **{SQNR: shifted(2.0, 0.1)}), named("worse", **{SQNR: shifted(-2.0, 0.1)})]
    changes += [named("same", **{SQNR: shifted(0.01, 0.2)}), named("open", **{SQNR: shifted(0.5, 4.0)})]
    found = summarize(sweep(tmp_path / "s", *changes))
    rows = {row["name"]: row for row in found["rows"]}
    assert [row["name"] for row in found["rows"]] == ["better", "open", "same", "none", "worse"]
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "none": "reference",
        "better": "better",
        "worse": "worse",
        "same": "equivalent (within 1)",
        "open": "no difference found",
    }
    assert rows["none"]["difference"] is None
    assert rows["better"]["difference"]["mean"] == pytest.approx(2.0)
    assert rows["better"]["pairs_needed"] == 1
    assert rows["open"]["pairs_needed"] > 24
    # Nothing is known of "open" but that it may be anywhere; the others are in their order but for it.
    assert rows["open"]["rank"] == [1, 5]
    assert rows["better"]["rank"] == [1, 2]
    assert rows["worse"]["rank"] == [4, 5]
    assert rows["none"]["rank"] == rows["same"]["rank"] == [2, 4]
    other = summarize(tmp_path / "s", reference="better", margin=3.0)
    assert {row["name"]: row["verdict"] for row in other["rows"]}["none"] == "equivalent (within 3)"


def test_intervals_are_wider_the_more_is_compared(tmp_path: Path) -> None:
    one = summarize(sweep(tmp_path / "one", named("x", **{SQNR: shifted(1.0, 0.4)})))
    many = [named(f"n{i}", **{SQNR: shifted(-1.0 - i)}) for i in range(8)]
    several = summarize(sweep(tmp_path / "several", named("x", **{SQNR: shifted(1.0, 0.4)}), *many))
    alone, among = (next(r for r in found["rows"] if r["name"] == "x") for found in (one, several))
    expected = estimate(difference(_items(shifted(1.0, 0.4)), _items(METRIC)), comparisons=9)
    assert among["difference"]["ci95"] == [expected.low, expected.high]
    assert among["difference"]["ci95"][0] <= alone["difference"]["ci95"][0]


def _items(metric: dict[str, Any]) -> list[Item]:
    return [Item(**item) for item in metric["per_item"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provenance.threads": 3}, "differs from .* in provenance.threads"),
        ({"generation.steps": 30}, "differs from .* in generation"),
        ({"model.fingerprint": "g"}, "differs from .* in model.fingerprint"),
        ({"calibration.input_absmax": {"a": 2.0}}, "differs from .* in calibration.input_absmax"),
        ({}, "two runs of none"),
        ({"quant.name": "pow2", "protect.blocks": [1]}, "differs from .* in protect.blocks"),
        ({"quant.weights": {"granularity": "per_channel", "rule": "direct"}}, "differs from .* in quant"),
        ({"mode": "analyze"}, "holds analyses"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(sweep(tmp_path, change))


def test_what_failed_or_runs_still_is_told(tmp_path: Path) -> None:
    folder = sweep(tmp_path, named("x"), named("y"), named("z"))
    names = {"quant": {"name": "hif8_w8a8"}, "protect": {"name": "x"}}
    Run(folder / "7", "ptq", "", names).fail(ValueError("out of luck"))
    Run(folder / "8", "ptq", "")
    (folder / "3" / "result.json").write_text("{")
    found = summarize(folder)
    assert [row["name"] for row in found["rows"]] == ["none", "x", "y"]
    assert found["failed"][1] == {"job": 7, "name": "hif8_w8a8, x", "error": "ValueError: out of luck"}
    assert "is not JSON" in found["failed"][0]["error"]
    assert found["unfinished"] == [8]
    with pytest.raises(ValueError, match="holds no runs"):
        summarize(folder / "0")
    with pytest.raises(ValueError, match="choose none, x, y"):
        summarize(folder, reference="w")


def test_a_broken_configuration_is_last_and_compared_with_nothing(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(METRIC))
    broken |= {"mean": None, "ci95": [None, None]}
    broken["per_item"][0]["value"] = None
    changes = named("broken", **{SQNR: broken}), named("x", **{SQNR: shifted(1.0)})
    rows = summarize(sweep(tmp_path, *changes))["rows"]
    assert [row["name"] for row in rows] == ["x", "none", "broken"]
    assert (rows[2]["rank"], rows[2]["difference"], rows[2]["verdict"]) == (None, None, "broken")
    assert rows[0]["rank"] == [1, 2]


def test_runs_of_several_states_of_the_code_are_cautioned_about(tmp_path: Path) -> None:
    changes = named("x", **{"provenance.git_commit": "abc", "provenance.dirty": True})
    cautions = summarize(sweep(tmp_path, changes))["cautions"]
    assert any("provenance.git_commit: None, abc" in caution for caution in cautions)
    assert any("changed after its commit" in caution for caution in cautions)
