"""Streaming statistics: against what the whole tensor says, merged, stored, and read from two processes."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import wan_inputs, wan_transformer
from wanquant.formats.registry import get_format
from wanquant.kernels import statistics as kernel
from wanquant.kernels.observe_loop import PER_OCTAVE
from wanquant.kernels.statistics import DYNAMIC_RULES, observe_rows
from wanquant.quant.scale import PerRow, PerTensor, parse_rule, quantize_matrix
from wanquant.quant.statistics import Layout, Observer, Site, Statistics, load_statistics, merge, save_statistics

HIF8 = get_format("hif8")


def spread(rows: int = 300, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Heavy-tailed, with channels of different size."""
    return (torch.randn(rows, columns) ** 3 * torch.logspace(-2, 1, columns) + 0.1).to(dtype)


def site_of(*tensors: torch.Tensor) -> Site:
    site = Site.empty(Layout(("v",), 1, 1, 1), tensors[0].shape[1], with_square=True)
    for tensor in tensors:
        site.add((0, 0, 0), 0, observe_rows(tensor), len(tensor))
    return site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_loop_measures_what_plain_torch_does(dtype: torch.dtype) -> None:
    x = spread(dtype=dtype)
    x[3], x[5, 7] = 0, 1e4
    ours, plain = observe_rows(x), kernel._anywhere(x, True)
    for name in ("counts", "zones", "channel_absmax"):
        assert np.array_equal(getattr(ours, name), getattr(plain, name))
    assert ours.absmax == plain.absmax
    assert np.allclose(ours.sums, plain.sums, rtol=1e-4)
    assert np.allclose(ours.channel_square, plain.channel_square, rtol=1e-4)


def test_magnitudes_of_planted_outliers_are_still_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the channels 2^28 larger, as planted; in parts on other devices, where no fourth power may overflow."""
    monkeypatch.setattr(kernel, "_AT_ONCE", 96 * 70)
    x = spread()
    x[:, ::2] *= 2.0**28
    ours, plain = observe_rows(x), kernel._anywhere(x, True)
    for name in ("counts", "zones", "channel_absmax"):
        assert np.array_equal(getattr(ours, name), getattr(plain, name))
    assert np.allclose(ours.sums, plain.sums, rtol=1e-4)
    view, exact = site_of(x).view(), np.sort(x.float().abs().numpy().ravel())
    for share in (0.4, 0.9, 0.999):
        value = exact[math.ceil(share * x.numel()) - 1]
        assert abs(view.quantile(share) - value) <= value / (2 * PER_OCTAVE)
    for step in (float(exact[-1]) / 15, float(exact[-1]) / 240):
        error = x.double() - HIF8.round(x.float() / step, "inf").double() * step
        expected = 10 * torch.log10(x.double().square().sum() / error.square().sum())
        assert view.static_sqnr(step, HIF8) == pytest.approx(expected.item(), abs=0.1)


def test_what_lies_beyond_the_histogram_is_not_guessed() -> None:
    x = spread(dtype=torch.float32)
    x[0, 0] = 2.0**50
    view = site_of(x).view()
    assert math.isfinite(view.quantile(0.99))
    assert math.isnan(view.quantile(1.0))
    assert math.isnan(view.static_sqnr(2.0**46, HIF8))
    assert view.absmax == 2.0**50


def test_what_every_block_reads_is_none_of_its_own() -> None:
    model = wan_transformer(3)
    with Observer(model, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer, torch.no_grad():
        model(**wan_inputs())
    inputs = observer.statistics.block_inputs(2).keys() - observer.statistics.own_inputs(2).keys()
    assert inputs == {"blocks.2.attn2.to_k", "blocks.2.attn2.to_v"}


def test_statistics_with_other_bins_are_not_read(tmp_path: Path) -> None:
    save_statistics(observed([0], ["a"]), tmp_path)
    path = tmp_path / "statistics.json"
    for old, new in (('"highest": 48', '"highest": 24'), ('"version": 3', '"version": 2')):
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="this program reads"):
            load_statistics(tmp_path)
        path.write_text(text)


def test_several_threads_measure_what_one_does() -> None:
    x = spread(3000, 96)
    whole, parts = observe_rows(x), [observe_rows(part) for part in x.chunk(4)]
    assert np.array_equal(whole.counts, sum(part.counts for part in parts))
    assert np.array_equal(whole.zones, sum(part.zones for part in parts))


@pytest.mark.parametrize("share", [0.5, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_percentiles_are_within_the_stated_error(share: float, dtype: torch.dtype) -> None:
    x = spread(2000, 96, dtype)
    exact = np.sort(x.float().abs().numpy().ravel())[math.ceil(share * x.numel()) - 1]
    assert abs(site_of(x).view().quantile(share) - exact) <= exact / (2 * PER_OCTAVE)


def test_moments_channels_and_zones() -> None:
    x = spread()
    x[:, 90] *= 100
    view, wide = site_of(x[:100], x[100:]).view(), x.double()
    assert view.mean == pytest.approx(wide.mean().item(), rel=1e-5)
    assert view.std == pytest.approx(wide.std(correction=0).item(), rel=1e-5)
    centred = wide - wide.mean()
    assert view.kurtosis == pytest.approx((centred.pow(4).mean() / centred.square().mean() ** 2).item(), rel=1e-5)
    assert 90 in view.outliers()
    assert view.absmax == wide.abs().max()
    assert sum(view.shares()) == pytest.approx(1)
    magnitude = wide.abs()
    three_bits = ((magnitude >= 2**-3) & (magnitude < 16)).double().mean().item()
    assert view.shares(1.0)[4] == pytest.approx(three_bits)


@pytest.mark.parametrize("rule", DYNAMIC_RULES, ids=lambda rule: rule.name)
def test_the_cost_of_dynamic_rules_is_that_of_rounding(rule: kernel.DynamicRule) -> None:
    x = spread()
    text = f"{'pow2' if rule.power_of_two else 'amax'}/{rule.target:g}"
    granularity = PerRow() if rule.per_row else PerTensor()
    rounded, scale, _ = quantize_matrix(x, granularity, parse_rule(text, HIF8), HIF8, "inf")  # type: ignore[arg-type]
    error = x.double() - rounded.double() * (scale[:, None] if rule.per_row else scale).double()
    expected = 10 * torch.log10(x.double().square().sum() / error.square().sum())
    assert site_of(x).view().sqnr(rule.name) == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("step", [1.0, 0.25, 0.37, 3.1])
def test_the_cost_of_one_step_is_read_from_the_histogram(step: float) -> None:
    x = spread()
    error = x.double() - HIF8.round(x.float() / step, "inf").double() * step
    expected = 10 * torch.log10(x.double().square().sum() / error.square().sum())
    assert site_of(x).view().static_sqnr(step, HIF8) == pytest.approx(expected.item(), abs=0.1)


def test_a_broken_activation_cannot_look_whole() -> None:
    x = spread()
    x[2, 2] = float("nan")
    site = site_of(x)
    view = site.view()
    assert math.isnan(site.largest())
    for value in (view.std, view.kurtosis, view.quantile(0.99), view.sqnr(DYNAMIC_RULES[0].name)):
        assert math.isnan(value)


def observed(videos: list[int], names: list[str], seeds: int = 4) -> Statistics:
    """Some of ``seeds`` videos of three steps and two branches through a small Wan, always the same ones."""
    torch.manual_seed(1)
    model = wan_transformer(2)
    inputs = [[[wan_inputs() for _ in range(2)] for _ in range(3)] for _ in range(seeds)]
    place = [(0, 0, 0)]
    with Observer(model, Layout(tuple(names), 3, 2, 2), lambda: place[0]) as observer, torch.no_grad():
        for index, video in enumerate(videos):
            for step in range(3):
                for branch in range(2):
                    place[0] = (index, step, branch)
                    model(**inputs[video][step][branch])
    return observer.statistics


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert a.layout == b.layout
    assert a.sites.keys() == b.sites.keys()
    for name, site in a.sites.items():
        for field in fields(Site):
            mine, theirs = getattr(site, field.name), getattr(b.sites[name], field.name)
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs, equal_nan=True), f"{name} {field.name}"


def test_merged_and_stored_statistics_equal_those_of_one_pass(tmp_path: Path) -> None:
    whole = observed([0, 1, 2, 3], ["0", "1", "2", "3"])
    save_statistics(observed([0], ["0"]), tmp_path)
    parts = [load_statistics(tmp_path), observed([1, 2], ["1", "2"]), observed([3], ["3"])]
    merged = merge(parts)
    assert_equal(merged, whole)
    for name, site in merged.sites.items():
        ours, theirs = site.view(), whole.sites[name].view()
        assert np.array_equal(ours.sums, theirs.sums, equal_nan=True)
    with pytest.raises(ValueError, match="have seen 0"):
        merged.merged(parts[0])


def test_inputs_that_are_shared_are_recorded_for_each_linear() -> None:
    statistics = observed([0], ["0"])
    sites = [statistics.site(f"blocks.0.attn1.to_{part}", "input") for part in "qkv"]
    assert all(np.array_equal(site.counts, sites[0].counts) for site in sites)
    assert statistics.site("blocks.1.attn2.to_k", "input").rows.sum() == 6 * 6


def test_coverage_names_what_stands_behind_it_and_what_does_not() -> None:
    statistics = observed([0, 1], ["0", "1"])
    first, *warnings = statistics.coverage()
    assert "2 of 2 videos, 3 of 3 steps in 2 bins, branches cond and uncond" in first
    assert warnings == []
    unseen = observed([0], ["0", "never"])
    unseen.layout = Layout(("0", "never"), 3, 3, 2)
    for site in unseen.sites.values():
        site.calls[:, 2] = 0
    assert unseen.coverage()[1:] == [f"warning: nothing seen in step bin 2, branch {b}" for b in ("cond", "uncond")]


def test_the_running_maximum_follows_the_calls() -> None:
    site = site_of(torch.full((2, 4), 8.0))
    assert site.ema() == 8.0
    site = Site.empty(Layout(("v",), 2, 1, 1), 4, with_square=False)
    site.note((0, 0, 0), 10.0, 1)
    site.note((0, 1, 0), 20.0, 1)
    assert site.ema() == pytest.approx(10.1)
