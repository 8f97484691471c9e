"""Smoothing and searched scales: nothing changes but rounding, and protected weights not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.kernels.inputs import assert_same_bits
from tests.models import wan_inputs, wan_transformer
from wanquant.kernels import eager, quantize_rows_hif8, scaled_round_hif8
from wanquant.kernels.statistics import observe_rows
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig, quantize_
from wanquant.quant.scheme import parse
from wanquant.quant.smooth import divisors, smooth_
from wanquant.quant.statistics import Layout, Observer, Site
from wanquant.wan.config import OutliersConfig
from wanquant.wan.families import FOLDS
from wanquant.wan.outliers import plant_outliers_


def stats_of(model: nn.Module) -> dict[str, float | Site]:
    with Observer(model, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer, torch.no_grad():
        model(**wan_inputs())
    sites = observer.statistics.sites
    return {name.removesuffix(":input"): site for name, site in sites.items() if name.endswith(":input")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_factors_multiply_before_rounding(dtype: torch.dtype) -> None:
    x, factors = torch.randn(70, 130).to(dtype), torch.ldexp(torch.ones(130), torch.randint(-20, 20, (130,)))
    for power_of_two in (False, True):
        got = quantize_rows_hif8(x, 15.0, power_of_two, "inf", factors)
        expected = eager.quantize_rows_hif8(x.float() * factors, 15.0, power_of_two, False)
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs)
    scale = torch.rand(70) + 0.01
    ours, over = scaled_round_hif8(x, scale, "inf", factors)
    theirs, over_theirs = eager.scaled_round_hif8(x.float() * factors, scale, False)
    assert_same_bits(ours, theirs)
    assert over == over_theirs


def test_folding_alone_changes_no_bit_of_the_output() -> None:
    model, inputs = wan_transformer(2), wan_inputs()
    with torch.no_grad():
        before = model(**inputs).sample
        names = [f"blocks.{i}.{name}" for i in range(2) for name in (*FOLDS, *FOLDS.values()) if name != "norm2"]
        homes = {name: ".".join(name.split(".")[:2]) for name in names}
        stats = {name: site for name, site in stats_of(model).items() if name in names}
        changed = model.blocks[1].norm2.weight.clone()
        done = smooth_(model, [n for n in names if "to_v" not in n] + ["blocks.0.attn1.to_v"], homes, stats, 0.5, FOLDS)
        assert not torch.equal(model.blocks[1].norm2.weight, changed)
        # What could not be folded keeps divisors: to_v itself, and the readers of a to_v that is not quantized.
        assert {name for name, one in done.items() if not one.folded} == {
            "blocks.0.attn1.to_v",
            "blocks.0.attn2.to_out.0",
        } | {f"blocks.1.{name}.to_out.0" for name in ("attn1", "attn2")}
        assert torch.equal(model(**inputs).sample, before)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_protected_weights_stay_bit_identical_after_calibration(strength: float | None) -> None:
    model = wan_transformer(4)
    stats = stats_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = QuantConfig(smoothing=strength, activations=ActivationConfig("per_tensor", "amax/15", True))
    report = quantize_(model, config, (0, -1), ("attn1.to_v", "ffn.*"), stats, folds=FOLDS)
    after = model.state_dict()
    protected = report.names("protected") + report.names("skipped")
    for name in protected:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    for name, tensor in before.items():
        if name.startswith(("blocks.0.", "blocks.3.")):
            assert torch.equal(after[name], tensor)
    layer = model.blocks[1].attn1.to_out[0]
    assert (layer.input_factor is None) == (strength is None)  # to_v is protected, so nothing is folded into it


def test_a_folded_linear_gets_the_scale_of_its_smoothed_input() -> None:
    """Whether the input arrives divided or is divided in the layer, it is the same input."""
    layers = {}
    for how, folds in (("folded", FOLDS), ("kept", {})):
        torch.manual_seed(0)
        model = wan_transformer(2)
        stats = stats_of(model)
        config = QuantConfig(
            smoothing=0.5,
            weights=WeightConfig("per_channel", "mse_output"),
            activations=ActivationConfig("per_tensor", "amax/15", True),
        )
        quantize_(model, config, stats=stats, folds=folds)
        layers[how] = model.blocks[1].attn2.to_q
    folded, kept = layers["folded"], layers["kept"]
    assert folded.input_factor is None
    assert kept.input_factor is not None
    site = stats["blocks.1.attn2.to_q"]
    assert isinstance(site, Site)
    divided = torch.from_numpy(site.view().channel_absmax) * kept.input_factor
    assert folded.input_scale.item() == kept.input_scale.item() == (divided.amax() / 15).item()
    assert folded.input_scale.item() != site.largest() / 15
    assert torch.equal(folded.weight, kept.weight)
    assert torch.equal(folded.weight_scale, kept.weight_scale)


def test_a_writer_without_weights_leaves_the_factors_to_the_reader() -> None:
    model = wan_transformer(1)
    model.blocks[0].norm2 = nn.Identity()
    quantize_(model, QuantConfig(smoothing=0.5), stats=stats_of(model), folds=FOLDS)
    assert model.blocks[0].attn2.to_q.input_factor is not None
    broken = wan_transformer(1)
    broken.blocks[0].norm2 = nn.Identity()
    with pytest.raises(ValueError, match="norm2 of block 0 has no weights"):
        plant_outliers_(broken, OutliersConfig(blocks=[0]))


def test_divisors_of_float32_weights_are_those_of_bf16() -> None:
    model = wan_transformer(1)
    site = stats_of(model)["blocks.0.ffn.net.2"]
    assert isinstance(site, Site)
    wide = torch.rand(64, 96) + 0.5
    assert torch.equal(divisors(wide, site, 0.5), divisors(wide.to(torch.bfloat16), site, 0.5))


def test_smoothing_undoes_a_spread_over_channels() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    powers = torch.ldexp(torch.ones(64), 28 * torch.randint(2, (64,)))
    with torch.no_grad():
        linear.weight /= powers.to(torch.bfloat16)
    x = (torch.randn(50, 64) * powers).to(torch.bfloat16)
    module = nn.Module()
    module.blocks = nn.ModuleList([linear])
    with Observer(module, Layout(("v",), 1, 1, 1), lambda: (0, 0, 0)) as observer, torch.no_grad():
        expected = module.blocks[0](x)
    stats: dict[str, float | Site] = {"blocks.0": observer.statistics.site("blocks.0", "input")}
    errors = []
    for strength in (None, 0.5):
        module.blocks = nn.ModuleList([linear])
        quantize_(module, QuantConfig(smoothing=strength), stats=stats)
        errors.append((module.blocks[0](x).float() - expected.float()).norm() / expected.float().norm())
    assert errors[0] > 0.3
    assert errors[1] < 0.05


def test_least_error_beats_the_fixed_targets() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(64, 256) ** 5)
    errors = {}
    for rule in ("mse", "amax/15", "amax/8", "amax/16"):
        layer = QuantLinear.from_linear(linear, parse(QuantConfig(weights=WeightConfig("per_channel", rule))))
        rebuilt = layer.weight.float() * layer.weight_scale[:, None]
        errors[rule] = (rebuilt - linear.weight.float()).square().sum(1)
    # 15 and 7.5 times a quarter power are among what it tries for each row; 16 is not.
    assert (errors["mse"] <= errors["amax/15"]).all()
    assert errors["mse"].sum() < min(errors[rule].sum() for rule in ("amax/8", "amax/16"))


def test_least_error_of_the_output_is_least_where_channels_differ() -> None:
    """Each rule is best by its own measure."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(64, 96) ** 5)
    x = (torch.randn(4000, 96) * torch.logspace(-2, 2, 96)).to(torch.bfloat16)
    site = Site.empty(Layout(("v",), 1, 1, 1), 96, with_square=True)
    site.add((0, 0, 0), 0, observe_rows(x), len(x))
    own, of_output = {}, {}
    for rule in ("mse", "mse_output"):
        layer = QuantLinear.from_linear(linear, parse(QuantConfig(weights=WeightConfig("per_channel", rule))), site)
        error = layer.weight.float() * layer.weight_scale[:, None] - linear.weight.float()
        own[rule], of_output[rule] = error.square().sum().item(), (x.float() @ error.T).square().sum().item()
    assert of_output["mse_output"] < 0.95 * of_output["mse"]
    assert own["mse"] < own["mse_output"]


def test_a_percentile_of_a_weight_overlooks_nothing_broken() -> None:
    linear = nn.Linear(200, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight[1, 7] = torch.inf
    layer = QuantLinear.from_linear(linear, parse(QuantConfig(weights=WeightConfig("per_channel", "p99/15"))))
    expected = linear.weight[0].float().abs().sort().values[197] / 15
    assert layer.weight_scale[0] == expected
    assert layer.weight_scale[1].isnan()
    assert layer.weight[1].isnan().all()


@pytest.mark.parametrize("rule", ["p99/15", "ema/15", "mse", "ofmr"])
def test_static_scales_come_from_statistics(rule: str) -> None:
    model = wan_transformer(2)
    config = QuantConfig(activations=ActivationConfig("per_tensor", rule, True), overflow="saturate")
    with pytest.raises(ValueError, match="full calibration statistics"):
        quantize_(model, config, stats=dict.fromkeys(stats_of(model), 1.0))
    stats = stats_of(model)
    quantize_(model, config, stats=stats)
    layer, site = model.blocks[1].ffn.net[2], stats["blocks.1.ffn.net.2"]
    assert isinstance(site, Site)
    if rule == "p99/15":
        assert layer.input_scale == torch.tensor(site.view().quantile(0.99)) / 15
    elif rule == "ema/15":
        assert layer.input_scale == torch.tensor(site.ema()) / 15
    elif rule == "ofmr":
        assert layer.input_scale.item() in [2.0**k for k in range(-5, 6)]
    else:
        view = site.view()
        noise = [
            view.noise(scale, layer.scheme.format, "saturate")
            for scale in (float(layer.input_scale), site.largest() / 15)
        ]
        assert noise[0] <= noise[1] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(weights=WeightConfig("per_channel", "ema")), "no history"),
        (QuantConfig(activations=ActivationConfig("per_token", "mse")), "static=true"),
        (QuantConfig(activations=ActivationConfig("per_tensor", "mse_output", True)), "for weights"),
        (QuantConfig(activations=ActivationConfig("per_tensor", "ema", True), smoothing=0.5), "smoothing"),
        (QuantConfig(smoothing=1.5), "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(config: QuantConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(config)
