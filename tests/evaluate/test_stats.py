from __future__ import annotations

import math

import numpy as np
import pytest

from wanquant.evaluate.stats import Item, difference, estimate


def items(values: np.ndarray) -> list[Item]:
    """[prompts, seeds]"""
    return [Item(f"p{p}", s, float(v)) for p, row in enumerate(values) for s, v in enumerate(row)]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.normal(5, 1, (20, 1)) + rng.normal(0, 0.3, (20, 3))
        e = estimate(items(values), seed=trial)
        hits += e.low <= 5 <= e.high
    assert 0.88 <= hits / 200 <= 0.98


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    same_within = np.repeat(rng.normal(0, 1, (10, 1)), 8, axis=1)
    clustered = estimate(items(same_within))
    as_if_free = estimate([Item(f"p{i}", 0, float(v)) for i, v in enumerate(same_within.flatten())])
    assert clustered.mean == pytest.approx(as_if_free.mean)
    assert clustered.high - clustered.low > 2 * (as_if_free.high - as_if_free.low)


def test_what_is_not_known_is_nan() -> None:
    one_prompt = estimate([Item("p", 0, 1.0), Item("p", 1, 2.0)])
    assert one_prompt.mean == 1.5
    assert math.isnan(one_prompt.low)
    broken = estimate([Item("p", 0, 1.0), Item("q", 0, float("nan"))])
    assert math.isnan(broken.mean)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_differences_are_paired() -> None:
    a, b = [Item("p", 0, 3.0), Item("q", 0, 5.0)], [Item("q", 0, 1.0), Item("p", 0, 1.0)]
    assert [item.value for item in difference(a, b)] == [2.0, 4.0]
    with pytest.raises(ValueError, match="same"):
        difference(a, b[:1])
