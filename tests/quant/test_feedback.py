"""Error feedback: against its definition, on grids, and what it is worth where inputs are correlated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.kernels.inputs import assert_same_bits
from tests.models import wan_inputs, wan_transformer
from wanquant.formats.base import Format
from wanquant.formats.blocks import BlockFormat
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig, quantize_
from wanquant.quant.feedback import DAMPING, HessianObserver, StoredHessians, add_outer_products_, feedback_bytes
from wanquant.quant.rotate import Rotation, rotate, rotation_of, signs
from wanquant.quant.scheme import parse
from wanquant.quant.smooth import Smoothing
from wanquant.quant.trainable import Training, check_trainable
from wanquant.wan.resources.footprint import Alive

FORMATS = ["hif8", "e4m3", "int8", "nvfp4", "mxfp4", "mxfp6", "mxfp8", "hif4", "int4_g64", "int4_g128"]


def config_of(format_: str, feedback: bool = True, granularity: str = "default", rule: str = "default") -> QuantConfig:
    weights = WeightConfig(granularity, rule, feedback)
    return QuantConfig(format=format_, weights=weights, activations=ActivationConfig(format="bf16"))


def correlated(rows: int = 2048, columns: int = 256) -> torch.Tensor:
    """As activations are: most of their energy in few directions."""
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -1.5, columns)
    return (torch.randn(rows, columns) @ (mix / columns**0.5).T).bfloat16()


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(x.shape[1], x.shape[1])
    add_outer_products_(total, x)
    return total


def values_of(layer: QuantLinear) -> torch.Tensor:
    scale = layer.weight_scale
    return layer.weight.detach().double() * (scale[:, None] if scale.ndim else scale).double()


def error_of(layer: QuantLinear, linear: nn.Linear, x: torch.Tensor) -> float:
    """Of the layer's output, over another input than the calibrated one."""
    return float((x.double() @ (values_of(layer) - linear.weight.detach().double()).T).norm())


@pytest.mark.parametrize("name", FORMATS)
def test_it_makes_up_for_errors_where_inputs_are_correlated(name: str) -> None:
    linear, seen, other = nn.Linear(256, 96).bfloat16(), correlated(), correlated(512)
    plain = QuantLinear.from_linear(linear, parse(config_of(name, feedback=False)))
    fed = QuantLinear.from_linear(linear, parse(config_of(name)), hessian=hessian_of(seen))
    assert error_of(fed, linear, seen) < 0.6 * error_of(plain, linear, seen)
    assert error_of(fed, linear, other) < 0.7 * error_of(plain, linear, other)
    assert torch.equal(fed.weight_scale, plain.weight_scale)
    assert_same_bits(fed.scheme.format.decode(fed.codes()), fed.weight.detach())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", FORMATS)
def test_without_correlations_it_is_plain_rounding(name: str, granularity: str) -> None:
    linear = nn.Linear(384, 40).bfloat16()
    linear.weight.data[3] *= 1e-3
    linear.weight.data[5] = 0
    rule = "direct" if name.startswith(("mx", "hif4", "int4")) else "amax"
    plain = QuantLinear.from_linear(linear, parse(config_of(name, False, granularity, rule)))
    for hessian in (3 * torch.eye(384), torch.zeros(384, 384)):
        fed = QuantLinear.from_linear(linear, parse(config_of(name, True, granularity, rule)), hessian=hessian)
        assert_same_bits(fed.weight.detach(), plain.weight.detach())
        assert torch.equal(fed.weight_scale, plain.weight_scale)


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, format_: Format) -> torch.Tensor:
    """Optimal brain surgery column by column, in float64: the inverse of what is left of the Hessian each time."""
    weight, found = weight.double().clone(), torch.empty_like(weight)
    hessian = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    for column in range(weight.shape[1]):
        if isinstance(format_, BlockFormat):
            place = column % format_.block
            if place == 0:
                rounder = format_.column_rounder(weight[:, column : column + format_.block].float())
            found[:, column] = rounder(weight[:, column].float(), place)
        else:
            found[:, column] = format_.round(weight[:, column].float(), format_.default_overflow)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (weight[:, column] - found[:, column].double()) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("name", ["hif8", "nvfp4", "hif4", "int4_g64"])
def test_it_is_what_the_definition_says(name: str) -> None:
    """Over two batches of columns; a weight near a tie may go the other way, and what follows it a little with it."""
    linear, hessian = nn.Linear(192, 32).bfloat16(), hessian_of(correlated(1024, 192))
    layer = QuantLinear.from_linear(linear, parse(config_of(name, rule="direct")), hessian=hessian)
    expected = by_definition(linear.weight.detach().float(), hessian, layer.scheme.format)
    assert (layer.weight.float() == expected).double().mean() > 0.98


@pytest.mark.parametrize("name", ["hif8", "nvfp4"])
def test_smoothing_divides_the_hessian_too(name: str) -> None:
    x, divisors = correlated(1024, 128), torch.randint(-2, 3, (128,)).float().exp2()
    linear, multiplied = nn.Linear(128, 32).bfloat16(), nn.Linear(128, 32).bfloat16()
    multiplied.weight.data = linear.weight.data * divisors.bfloat16()
    scheme = parse(config_of(name))
    smoothed = QuantLinear.from_linear(linear, scheme, None, Smoothing(divisors, False), hessian=hessian_of(x))
    expected = QuantLinear.from_linear(multiplied, scheme, hessian=hessian_of(x / divisors.bfloat16()))
    assert (smoothed.weight == expected.weight).double().mean() > 0.98


@pytest.mark.parametrize("rotation", [None, Rotation(32, arrives=True)])
def test_it_goes_together_with_rotation_and_a_low_rank_branch(rotation: Rotation | None) -> None:
    x, linear = correlated(columns=128), nn.Linear(128, 64).bfloat16()
    layers = []
    for feedback in (False, True):
        config = replace(config_of("nvfp4", feedback), rotation=32, low_rank=4)
        layers.append(QuantLinear.from_linear(linear, parse(config), rotation=rotation, hessian=hessian_of(x)))
    given = x if rotation is None else rotate(x, rotation_of(signs(32))).bfloat16()
    expected = linear(x).double()
    plain, fed = ((layer(given).double() - expected).norm() for layer in layers)
    assert fed < 0.7 * plain


def test_what_is_not_finite_stays_alone() -> None:
    linear, hessian = nn.Linear(128, 4).bfloat16(), hessian_of(correlated(512, 128))
    linear.weight.data[1, 70] = float("nan")
    layer = QuantLinear.from_linear(linear, parse(config_of("mxfp4")), hessian=hessian)
    broken = layer.weight.isnan()
    assert broken[1, 64:96].all()
    assert broken.sum() == 32
    hessian[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite in calibration"):
        QuantLinear.from_linear(linear, parse(config_of("mxfp4")), hessian=hessian)


def test_a_model_is_observed_and_quantized_by_it(tmp_path: Path) -> None:
    """Q, K and V share one sum; K and V of all blocks that of the text; sums are kept and read as they are."""
    model, given = wan_transformer(2), [wan_inputs() for _ in range(3)]
    names = [name for name, child in model.blocks.named_modules(prefix="blocks") if isinstance(child, nn.Linear)]
    entered: list[torch.Tensor] = []
    hook = model.blocks[1].attn1.to_v.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with HessianObserver(model, names) as observer, torch.no_grad():
        for each in given:
            model(**each)
    hook.remove()
    assert set(observer) == set(names)
    expected = sum(x.flatten(0, 1).double().T @ x.flatten(0, 1).double() for x in entered)
    assert torch.allclose(observer["blocks.1.attn1.to_v"].double(), torch.as_tensor(expected), rtol=1e-4)
    assert observer["blocks.1.attn1.to_q"] is observer["blocks.1.attn1.to_v"]
    assert observer["blocks.0.attn2.to_k"] is observer["blocks.1.attn2.to_v"]
    assert observer.nbytes == 4 * (2 * (5 * 48**2 + 96**2) + 48**2)
    for block in range(2):
        (tmp_path / str(block)).mkdir()
        observer.save([name for name in names if name.startswith(f"blocks.{block}.")], tmp_path / str(block))
    stored = StoredHessians([tmp_path / "0", tmp_path / "1"])
    assert set(stored) == set(names)
    assert all(torch.equal(stored[name], observer[name]) for name in names)
    with pytest.raises(ValueError, match=r"the Hessian of the input of blocks\.0\.\S+ \(20 missing\)"):
        quantize_(model, config_of("nvfp4"))
    linear = model.blocks[1].attn1.to_v
    alone = QuantLinear.from_linear(linear, parse(config_of("nvfp4")), hessian=observer["blocks.1.attn1.to_v"])
    quantize_(model, config_of("nvfp4"), hessians=stored)
    assert_same_bits(model.blocks[1].attn1.to_v.weight.detach(), alone.weight.detach())
    assert model(**given[0]).sample.isfinite().all()


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16 rounds no weights"):
        parse(QuantConfig(format="bf16", weights=WeightConfig(feedback=True)))
    with pytest.raises(ValueError, match="feedback=true cannot be trained"):
        check_trainable(parse(config_of("nvfp4")), Training())


@pytest.mark.parametrize(("columns", "rows"), [(512, 64), (64, 512)])
def test_the_memory_it_takes_is_what_is_planned(columns: int, rows: int) -> None:
    linear = nn.Linear(columns, rows).bfloat16()
    hessian, alive = torch.eye(columns), Alive([*linear.parameters()])
    with alive:
        QuantLinear.from_linear(linear, parse(config_of("int8")), hessian=hessian.clone())
    planned = feedback_bytes(linear) + 2 * linear.weight.numel()
    assert 0.8 * planned < alive.most < 1.05 * planned
