"""A sweep as a ranked table: what is compared, what is said of it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluate.results import METRIC, metric, named, shifted, sweep
from wanquant.evaluate.stats import Estimate, Item, compared, detectable, difference
from wanquant.evaluate.sweep.summary import pairs_needed, summarize, verdict
from wanquant.runs.reports.sweep_table import MANY_PAIRS
from wanquant.runs.run import Run, clean_json, failed_result

SQNR = "metrics.step_sqnr"


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
    """Four times as wide as it may be: sixteen times the pairs. And of many draws the typical answer is right."""
    assert pairs_needed(between(-3.0, 5.0, mean=1.0)) == 24 * 16
    assert pairs_needed(between(-5.0, 3.0, mean=-1.0)) == 24 * 16
    assert pairs_needed(between(0.5, 1.5, mean=1.0)) == 6
    assert pairs_needed(between(-1.0, 1.0, mean=0.0)) == MANY_PAIRS
    assert pairs_needed(between(0.0, 0.0, mean=0.0)) is None
    rng, truth = np.random.default_rng(0), 0.5

    def drawn(prompts: int) -> Estimate:
        values = rng.normal(truth, 1.0, prompts)
        return compared([Item(f"p{i}", 0, float(value)) for i, value in enumerate(values)])

    needed = math.ceil((1.96 / truth) ** 2)
    found = np.mean([drawn(needed).low > 0 for _ in range(200)])
    assert 0.35 < found < 0.65
    typical = np.median([pairs_needed(drawn(60)) for _ in range(200)])
    assert 0.7 * needed < typical < 1.6 * needed


def test_what_could_have_been_seen_is_seen_four_times_in_five() -> None:
    rng, prompts = np.random.default_rng(1), 12

    def drawn(truth: float) -> Estimate:
        return compared([Item(f"p{i}", 0, float(value)) for i, value in enumerate(rng.normal(truth, 1.0, prompts))], 3)

    could_see = float(np.mean([detectable(drawn(0.0), 3) for _ in range(400)]))
    told = np.mean([drawn(could_see).low > 0 for _ in range(400)])
    assert 0.72 < told < 0.88
    assert math.isnan(detectable(between(-1.0, 1.0)))  # of a single prompt


def test_rows_are_ranked_and_compared_pair_by_pair(tmp_path: Path) -> None:
    """Means differ by far less than the prompts do, but every pair says the same."""
    changes = [named("better", **{SQNR: shifted(2.0, 0.1)}), named("worse", **{SQNR: shifted(-2.0, 0.1)})]
    changes += [named("same", **{SQNR: shifted(0.01, 0.05)}), named("open", **{SQNR: shifted(0.5, 4.0)})]
    found = summarize(sweep(tmp_path / "s", *changes))
    rows = {row["name"]: row for row in found["rows"]}
    assert [row["name"] for row in found["rows"]] == ["better", "open", "same", "none", "worse"]
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "none": "reference",
        "better": "better",
        "worse": "worse",
        "same": "equivalent (within 0.5)",
        "open": "no difference found",
    }
    assert rows["none"]["difference"] is None
    assert rows["better"]["difference"]["mean"] == pytest.approx(2.0)
    assert rows["better"]["pairs_needed"] < 24
    assert rows["open"]["pairs_needed"] > 24
    low, high = rows["open"]["difference"]["ci95"]
    assert (high - low) / 2 < rows["open"]["could_see"] < 0.8 * (high - low)
    assert rows["none"]["could_see"] is None
    # All have drifted alike.
    assert rows["better"]["drift"]["mean"] == 0.0
    assert rows["none"]["drift"] is None
    # Nothing is known of "open" but that it may be anywhere; the others are in their order but for it.
    assert rows["open"]["rank"] == [1, 5]
    assert rows["better"]["rank"] == [1, 2]
    assert rows["worse"]["rank"] == [4, 5]
    assert rows["none"]["rank"] == rows["same"]["rank"] == [2, 4]
    other = summarize(tmp_path / "s", reference="better", margin=3.0)
    assert {row["name"]: row["verdict"] for row in other["rows"]}["none"] == "equivalent (within 3)"


def test_equal_configurations_are_told_apart_no_more_often_than_five_times_in_a_hundred() -> None:
    """Five, twelve prompts each, two seeds: all comparisons together, with the first and of any two."""
    rng, trials, against_first, of_any = np.random.default_rng(0), 400, 0, 0
    for _ in range(trials):
        values = rng.normal(0, 2, (5, 12, 1)) + rng.normal(0, 1, (5, 12, 2))
        items = [[Item(f"p{p}", s, float(v[p, s])) for p in range(12) for s in range(2)] for v in values]

        def apart(a: int, b: int, comparisons: int, items: list[list[Item]] = items) -> bool:
            found = compared(difference(items[a], items[b]), comparisons)
            return not found.low <= 0 <= found.high

        against_first += any(apart(other, 0, 4) for other in range(1, 5))
        of_any += any(apart(a, b, 10) for a in range(5) for b in range(a))
    assert against_first / trials <= 0.07
    assert of_any / trials <= 0.07
    assert against_first / trials >= 0.01


def test_intervals_are_wider_the_more_is_compared(tmp_path: Path) -> None:
    one = summarize(sweep(tmp_path / "one", named("x", **{SQNR: shifted(1.0, 0.4)})))
    many = [named(f"n{i}", **{SQNR: shifted(-1.0 - i)}) for i in range(8)]
    several = summarize(sweep(tmp_path / "several", named("x", **{SQNR: shifted(1.0, 0.4)}), *many))
    alone, among = (next(r for r in found["rows"] if r["name"] == "x") for found in (one, several))
    expected = compared(difference(_items(shifted(1.0, 0.4)), _items(METRIC)), comparisons=9)
    assert among["difference"]["ci95"] == [expected.low, expected.high]
    assert among["difference"]["ci95"][0] < alone["difference"]["ci95"][0] < 1.0
    assert among["difference"]["ci95"][1] > alone["difference"]["ci95"][1] > 1.0


def test_what_collapsed_has_no_rank_whatever_its_average(tmp_path: Path) -> None:
    collapsed = named("static", **{SQNR: shifted(3.0), "gates.static.verdict": "fail"})
    found = summarize(sweep(tmp_path / "s", collapsed, named("x", **{SQNR: shifted(1.0)})))
    rows = {row["name"]: row for row in found["rows"]}
    assert [row["name"] for row in found["rows"]] == ["x", "none", "static"]
    assert (rows["static"]["verdict"], rows["static"]["rank"]) == ("collapsed", None)
    assert (rows["x"]["rank"], rows["none"]["rank"]) == ([1, 1], [2, 2])
    assert found["cautions"] == []
    assert "static collapsed" in summarize(tmp_path / "s", reference="static")["cautions"][0]


def test_with_one_prompt_nothing_is_known(tmp_path: Path) -> None:
    alone = metric({("a", seed): 20.0 + seed for seed in range(24)})
    other = metric({("a", seed): 21.0 + seed for seed in range(24)})
    folder = sweep(tmp_path, named("x", **{SQNR: other}))
    for number, value in (("0", alone), ("1", other)):
        result = json.loads((folder / number / "result.json").read_text())
        result["metrics"]["step_sqnr"] = clean_json(value)
        (folder / number / "result.json").write_text(json.dumps(result))
    found = summarize(folder)
    row = next(row for row in found["rows"] if row["name"] == "x")
    assert row["difference"]["ci95"] == [None, None]
    assert (row["verdict"], row["rank"], row["pairs_needed"]) == ("unknown", [1, 2], None)
    assert json.loads(json.dumps(found)) == found


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
        ({"mode": "analyze"}, "holds analyses"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarize(sweep(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            {"quant.name": "pow2", "protect.blocks": [1]},
            ["hif8_w8a8, protect.blocks=[]", "pow2, protect.blocks=[1]"],
        ),
        (
            {"quant.weights": {"granularity": "per_channel", "rule": "direct"}},
            ["none, quant.weights.rule=amax/15", "none, quant.weights.rule=direct"],
        ),
        ({"protect.name": "x", "protect.blocks": [1]}, ["none", "x"]),
    ],
)
def test_what_has_no_name_of_its_own_is_told_apart_by_its_settings(
    tmp_path: Path, change: dict[str, Any], names: list[str]
) -> None:
    """As in a sweep over ``qat.lr``, or over rules."""
    found = summarize(sweep(tmp_path, change))
    assert sorted(row["name"] for row in found["rows"]) == names


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


def test_who_is_compared_with_what_is_said_when_the_first_job_failed(tmp_path: Path) -> None:
    folder = sweep(tmp_path, named("x"), named("y"))
    (folder / "0" / "result.json").write_text(json.dumps(failed_result("no")))
    assert summarize(folder)["cautions"] == ["job 0 failed, so the others are compared with x"]


def test_a_demonstration_has_no_verdicts(tmp_path: Path) -> None:
    folder = sweep(tmp_path, named("x", **{SQNR: shifted(2.0, 0.1)}))
    for path in folder.glob("*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"demonstration": True}))
    found = summarize(folder)
    assert [(row["name"], row["verdict"], row["rank"]) for row in found["rows"]] == [
        ("x", "too few pairs", None),
        ("none", "reference", None),
    ]


def test_a_broken_configuration_is_last_and_compared_with_nothing(tmp_path: Path) -> None:
    broken = json.loads(json.dumps(METRIC))
    broken |= {"mean": None, "ci95": [None, None]}
    broken["per_item"][0]["value"] = None
    changes = named("broken", **{SQNR: broken}), named("x", **{SQNR: shifted(1.0, 0.1)})
    rows = summarize(sweep(tmp_path, *changes))["rows"]
    assert [row["name"] for row in rows] == ["x", "none", "broken"]
    assert (rows[2]["rank"], rows[2]["difference"], rows[2]["verdict"]) == (None, None, "broken")
    assert (rows[0]["rank"], rows[1]["rank"]) == ([1, 1], [2, 2])


def test_runs_of_several_states_of_the_code_are_cautioned_about(tmp_path: Path) -> None:
    changes = named("x", **{"provenance.git_commit": "abc", "provenance.dirty": True})
    cautions = summarize(sweep(tmp_path, changes))["cautions"]
    assert any("provenance.git_commit: None, abc" in caution for caution in cautions)
    assert any("changed after its commit" in caution for caution in cautions)
