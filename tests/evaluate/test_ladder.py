"""Rank correlations of cheap measures with expensive ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy.stats import spearmanr

from wanquant.evaluate.sweep.ladder import MANY, ladder

LATENT = [30.0, 20.0, 25.0, 28.0, 22.0, 31.0, 18.0, 26.0]
PSNR = [41.0, 30.0, 37.0, 36.0, 33.0, 42.0, 31.0, 38.0]


def rows(**metrics: list[float | None]) -> list[dict[str, Any]]:
    count = len(next(iter(metrics.values())))
    return [{"metrics": {name: {"mean": values[i]} for name, values in metrics.items()}} for i in range(count)]


def rung(found: dict[str, Any] | None, name: str) -> dict[str, Any]:
    assert found is not None
    (only,) = (rung for rung in found["rungs"] if rung["name"] == name)
    correlations: dict[str, Any] = only["correlations"]
    return correlations


def test_against_scipy_and_turned_where_less_is_better() -> None:
    lpips = [-value for value in LATENT]
    found = ladder(rows(latent_sqnr=LATENT, psnr=PSNR, lpips=lpips, attributes=[1.0] * MANY))
    assert found is not None
    assert found["cheap"] == ["latent_sqnr", "psnr"]
    assert not found["few"]
    assert rung(found, "psnr")["latent_sqnr"][0] == pytest.approx(spearmanr(LATENT, PSNR).statistic)
    assert rung(found, "lpips")["latent_sqnr"] == pytest.approx([1.0, 1.0, 1.0])
    assert rung(found, "attributes") == {"latent_sqnr": None, "psnr": None}
    low, high = rung(found, "psnr")["latent_sqnr"][1:]
    assert -1 <= low < rung(found, "psnr")["latent_sqnr"][0] <= high <= 1


def test_the_cheapest_comes_first_and_judges_last() -> None:
    measures = {"psnr": PSNR, "latent_sqnr": LATENT, "block_sqnr": PSNR, "vbench.imaging_quality": LATENT, "ssim": PSNR}
    found = ladder(rows(**measures))
    assert found is not None
    assert found["cheap"] == ["block_sqnr", "latent_sqnr", "psnr"]
    assert [rung["name"] for rung in found["rungs"]] == ["latent_sqnr", "psnr", "ssim", "vbench.imaging_quality"]
    assert set(rung(found, "latent_sqnr")) == {"block_sqnr"}
    assert set(rung(found, "vbench.imaging_quality")) == {"block_sqnr", "latent_sqnr", "psnr"}


def test_few_and_broken_configurations() -> None:
    assert ladder(rows(latent_sqnr=LATENT[:2], psnr=PSNR[:2])) is None
    broken = ladder(rows(latent_sqnr=[*LATENT[:4], None], psnr=[*PSNR[:4], 1.0]))
    assert broken is not None
    assert (broken["configurations"], broken["few"]) == (4, True)
    correlation, low, high = rung(broken, "psnr")["latent_sqnr"]
    assert math.isfinite(correlation)
    assert [math.isnan(low), math.isnan(high)] == [True, True], "of four an interval would have no width"
