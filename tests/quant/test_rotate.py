"""Rotation changes nothing but what is rounded; a low-rank branch takes what is hard to round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from tests.jobs import short
from tests.models import wan_inputs
from wanquant import load_pipeline
from wanquant.formats.registry import FORMATS, BFloat16, register_format
from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig, quantize_
from wanquant.quant.convert import folded_names
from wanquant.quant.low_rank import low_rank
from wanquant.quant.rotate import rotate, rotation_of, signs
from wanquant.quant.scheme import parse
from wanquant.wan.families import FOLDS

SIGNS = [-1, 1, -1, -1, 1, 1, -1, 1, -1, -1, -1, 1, -1, 1, -1, 1]


class Unrounded(BFloat16):
    """BF16, as a format that linears are converted to: what methods change besides rounding shows."""

    name = "unrounded"
    keeps_all = False

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing here is packed")


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("wanquant.formats.registry.FORMATS", dict(FORMATS))
    register_format(Unrounded())
    return "unrounded"


def transformer() -> WanTransformer3DModel:
    """64 wide, in heads of 32."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, text_dim=32, freq_dim=64
    )
    return model.eval().to(torch.bfloat16)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("size", [2, 16, 64, 512])
def test_rotations_are_orthogonal(size: int) -> None:
    by = rotation_of(signs(size))
    torch.testing.assert_close(by @ by.T, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(by.abs(), torch.full_like(by, size**-0.5))
    assert size < 16 or 0 < (signs(size) < 0).sum() < size


def test_signs_are_always_the_same() -> None:
    """Two models that were rotated on different machines have the same."""
    assert signs(16).tolist() == SIGNS


def test_rotation_leaves_bf16_to_its_last_bit(unrounded: str) -> None:
    """All that is left is that rotated inputs and weights were rounded to BF16."""
    plain, rotated = transformer(), transformer()
    inputs = {**wan_inputs(), "encoder_hidden_states": torch.randn(1, 6, 32).to(torch.bfloat16)}
    direct = {"weights": WeightConfig(rule="direct"), "activations": ActivationConfig(rule="direct")}
    quantize_(plain, QuantConfig(format=unrounded, **direct))
    quantize_(rotated, QuantConfig(format=unrounded, rotation=16, **direct), folds=FOLDS)
    with torch.no_grad():
        expected, found = plain(**inputs).sample, rotated(**inputs).sample
    assert 0 < relative(found, expected) < 2**-7


def test_a_rotation_is_folded_into_what_makes_values(unrounded: str) -> None:
    model = transformer()
    direct = {"weights": WeightConfig(rule="direct"), "activations": ActivationConfig(rule="direct")}
    before = model.blocks[0].attn1.to_v.weight.detach().float().clone()
    kept = model.blocks[1].attn2.to_v.weight
    config = QuantConfig(format=unrounded, rotation=64, **direct)
    quantize_(model, config, protected_modules=["attn2.to_v"], folds=FOLDS)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    arrives = {name for name, layer in layers.items() if layer.input_signs is None}
    assert arrives == {f"blocks.{block}.attn1.to_out.0" for block in range(2)}
    assert model.blocks[1].attn2.to_v.weight is kept
    # Heads are of 32 channels, so that blocks of 64 are halved there; its own input is rotated in blocks of 64.
    of_head, of_input = rotation_of(signs(32)), rotation_of(signs(64))
    expected = rotate(rotate(before.T, of_head).T, of_input).to(torch.bfloat16)
    assert torch.equal(layers["blocks.0.attn1.to_v"].weight, expected)
    assert folded_names(model, FOLDS) == arrives | {name.replace("to_out.0", "to_v") for name in arrives}


def test_nothing_is_folded_beside_a_hook(unrounded: str) -> None:
    model = transformer()
    model.blocks[0].attn1.to_v.register_forward_hook(lambda *_: None)
    model.blocks[1].attn1.to_out[0].register_forward_hook(lambda *_: None)
    direct = {"weights": WeightConfig(rule="direct"), "activations": ActivationConfig(rule="direct")}
    quantize_(model, QuantConfig(format=unrounded, rotation=16, **direct), folds=FOLDS)
    assert model.blocks[0].attn1.to_out[0].input_signs is not None
    assert model.blocks[1].attn1.to_out[0].input_signs is not None
    assert model.blocks[0].attn2.to_out[0].input_signs is None


def test_rotation_spreads_a_planted_outlier() -> None:
    linear, x = nn.Linear(256, 64, dtype=torch.bfloat16), torch.randn(300, 256)
    x[:, [7, 77, 130, 200]] *= 10
    x = x.to(torch.bfloat16)
    expected = linear(x)
    errors = []
    for rotation in (None, 64):
        config = QuantConfig(format="int4_g64", rotation=rotation)
        errors.append(relative(QuantLinear.from_linear(linear, parse(config))(x), expected))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("format_", ["nvfp4", "hif4", "int4_g64"])
def test_a_low_rank_branch_removes_half_of_the_error_of_outliers(format_: str) -> None:
    """Rank 32, of outliers planted in 16 input channels."""
    linear, x = nn.Linear(512, 256, dtype=torch.bfloat16), torch.randn(300, 512).to(torch.bfloat16)
    linear.weight.data[:, torch.randperm(512)[:16]] *= 20
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    errors = []
    for rank in (0, 32):
        config = QuantConfig(format=format_, low_rank=rank, activations=ActivationConfig(format="bf16"))
        errors.append(relative(QuantLinear.from_linear(linear, parse(config))(x), expected))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(("shape", "rank"), [((96, 64), 8), ((64, 200), 20), ((24, 40), 32)])
def test_the_branch_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape) * torch.logspace(0, -2, shape[1])
    up, down = low_rank(weight, rank)
    assert up.shape == (shape[0], min(rank, *shape))
    assert down.shape == (min(rank, *shape), shape[1])
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert relative(up.float() @ down.float(), weight) < relative(best, weight) * 1.01 + 2**-7
    assert torch.equal(up, low_rank(weight, rank)[0])


@pytest.mark.parametrize("how", [{"rotation": 16}, {"low_rank": 8}, {"rotation": 32, "low_rank": 4}])
def test_a_layer_is_what_its_plain_linear_is(how: dict[str, object]) -> None:
    """Of weights alone, so that what is left is the rounding of the plain linear to BF16."""
    linear, x = nn.Linear(64, 32, dtype=torch.bfloat16), torch.randn(50, 64).to(torch.bfloat16)
    how = {"format": "e4m3", "activations": ActivationConfig(format="bf16"), **how}
    layer = QuantLinear.from_linear(linear, parse(QuantConfig(**how)))
    assert relative(layer(x), layer.dequantized()(x)) < 2**-7


def test_layers_move_and_keep_their_types() -> None:
    linear, x = nn.Linear(64, 32, dtype=torch.bfloat16), torch.randn(9, 64).to(torch.bfloat16)
    layer = QuantLinear.from_linear(linear, parse(QuantConfig(format="hif4", rotation=16, low_rank=4)))
    expected, types = layer(x), {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert torch.equal(layer.float()(x), expected)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == types
    moved = layer.to("meta")
    assert moved._rotation is None  # made anew where the layer goes, and not left where it was
    assert moved(x.to("meta")).shape == expected.shape


def test_a_lora_is_refused_where_rotation_is_folded() -> None:
    pipe = load_pipeline(short(2), device="cpu")
    quantize_(pipe.transformer, QuantConfig(format="hif4", rotation=16), folds=FOLDS)
    for modules, wrong in ((["attn1.to_v"], True), (["ffn.net.2"], False)):
        config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        if not wrong:
            pipe.transformer.add_adapter(config)
            continue
        with pytest.raises(ValueError, match=r"a LoRA on blocks\.0\.attn1\.to_v, into which smoothing or rotation"):
            pipe.transformer.add_adapter(config)
        assert isinstance(pipe.transformer.blocks[0].attn1.to_v, QuantLinear)


def test_what_does_not_go_with_a_rotation_is_named() -> None:
    static = ActivationConfig(granularity="per_tensor", static=True)
    for config, message in (
        (QuantConfig(rotation=24), r"quant\.rotation=24: must be a power of two"),
        (QuantConfig(rotation=16, activations=static), r"quant\.activations\.static=true was found on inputs"),
        (
            QuantConfig(rotation=16, weights=WeightConfig(rule="mse_output")),
            r"quant\.weights\.rule=mse_output was found",
        ),
        (QuantConfig(low_rank=-1), r"quant\.low_rank=-1: must be a rank"),
        (QuantConfig(format="bf16", rotation=16), r"quant\.rotation=16: bf16 rounds no weights"),
        (QuantConfig(format="bf16", low_rank=4), r"quant\.low_rank=4: bf16 rounds no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(config)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q cannot be rotated: 64 channels .* blocks of 128"):
        quantize_(transformer(), QuantConfig(rotation=128))
