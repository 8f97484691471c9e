"""Products of codes with scales of blocks: what a card would get is what is multiplied elsewhere; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from wanquant.quant import ActivationConfig, QuantConfig, QuantLinear, WeightConfig
from wanquant.quant.block_codes import (
    E2M1,
    E4M3,
    E8M0,
    BlockCodes,
    _operand,
    check_capability,
    encode_input,
    in_tiles,
    multiply,
    of_packed,
)
from wanquant.quant.scheme import Scheme, parse

CONFIGS = {
    "nvfp4": QuantConfig(format="nvfp4", product="fp4"),
    "nvfp4 static": QuantConfig(format="nvfp4", product="fp4", activations=ActivationConfig(static=True)),
    "mxfp4": QuantConfig(format="mxfp4", product="fp4"),
    "mxfp8": QuantConfig(format="mxfp8", product="fp8"),
}


def inputs(rows: int = 150, columns: int = 192) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(rows, columns) * torch.exp(2 * torch.randn(rows, columns))
    x[0] = 0.0
    x[1, 3] = -0.0
    return x.to(torch.bfloat16)


def layer_of(config: QuantConfig) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(192, 160, dtype=torch.bfloat16), parse(config), 8.0)


def values(scheme: Scheme, codes: BlockCodes) -> torch.Tensor:
    """BF16, by the format's own decoding of a packed row."""
    return scheme.format.decode(torch.cat([codes.codes, codes.blocks], dim=1))


@pytest.mark.parametrize("which", CONFIGS)
def test_a_card_gets_the_values_that_are_multiplied_elsewhere(which: str) -> None:
    """Bit for bit, and the same scales and counts: of inputs, also multiplied by factors, and of weights."""
    layer, x = layer_of(CONFIGS[which]), inputs()
    for factors in (None, torch.exp2(torch.randint(-3, 3, (192,)).float())):
        wanted, scale, over = layer.scheme.quantize_input(x, layer.input_scale, factors)
        found = encode_input(layer.scheme, x, layer.input_scale, factors)
        assert torch.equal(values(layer.scheme, found).view(torch.int16), wanted.view(torch.int16))
        assert torch.equal(found.scale, scale)
        assert found.over == (0 if over is None else over)
        assert (found.over > 0) == ("static" in which)
    weight = of_packed(layer.codes(), 192, layer.weight_scale, layer.scheme.format.bits)
    assert torch.equal(values(layer.scheme, weight), layer.scheme.format.decode(layer.codes()))
    assert weight.codes.is_contiguous()


def test_what_is_not_finite_stays_visible() -> None:
    layer, x = layer_of(CONFIGS["nvfp4 static"]), inputs()
    x[2, 17], x[3, 40] = torch.nan, torch.inf
    found = values(layer.scheme, encode_input(layer.scheme, x, layer.input_scale, None))
    wanted = layer.scheme.quantize_input(x, layer.input_scale)[0]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 32
    assert encode_input(parse(CONFIGS["nvfp4"]), x, None, None).scale.isnan()


def elements_of(side: BlockCodes, bits: int) -> torch.Tensor:
    """By torch's own reading of E4M3, or by a list of those of E2M1."""
    if bits == 8:
        return side.codes.view(E4M3).float()
    assert side.codes.view(E2M1).shape == side.codes.shape
    codes = torch.stack([side.codes & 15, side.codes >> 4], dim=-1).flatten(1).long()
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * (1 - 2 * (codes >> 3))


@pytest.mark.parametrize("which", CONFIGS)
def test_scales_and_codes_multiply_to_what_the_cpu_answers(which: str) -> None:
    """The units' own formula, of the tensors as they are handed over."""
    layer, x = layer_of(CONFIGS[which]), inputs()
    sides = []
    for side_ in (
        encode_input(layer.scheme, x, layer.input_scale, None),
        of_packed(layer.codes(), 192, layer.weight_scale, layer.scheme.format.bits),
    ):
        tiles, how, layout = _operand(side_)
        assert len(tiles) == len(how) == len(layout) == (1 if which[:2] == "mx" else 2)
        assert tiles[0].dtype == (E8M0 if which[:2] == "mx" else E4M3)
        rows, blocks = side_.blocks.shape
        places = [
            [
                ((r // 128 * -(-blocks // 4) + b // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + b % 4
                for b in range(blocks)
            ]
            for r in range(rows)
        ]
        scale = tiles[0].float()[torch.tensor(places)]
        elements = elements_of(side_, layer.scheme.format.bits)
        side = (elements.view(rows, blocks, -1) * scale[..., None]).view(rows, -1).double()
        sides.append(side * tiles[1] if len(tiles) > 1 else side)
    wanted = sides[0] @ sides[1].T + layer.bias.double()
    exact = layer_of(replace(CONFIGS[which], product="exact"))(x)
    assert torch.allclose(exact.double(), wanted, rtol=2**-7, atol=1e-3 * float(wanted.abs().max()))
    fast = layer_of(replace(CONFIGS[which], product="fast"))
    assert torch.equal(layer(x), fast(x))
    assert layer.is_packed
    assert not fast.is_packed


def test_scales_of_blocks_lie_in_tiles() -> None:
    scale = torch.randint(100, 150, (200, 6), dtype=torch.uint8)  # bytes of E8M0
    tiles = in_tiles(scale).view(torch.uint8).view(2, 2, 512)
    assert (tiles == 127).sum() >= 2 * 2 * 512 - scale.numel()  # the rest is 1
    for row, block in ((0, 0), (1, 0), (33, 2), (127, 3), (128, 4), (199, 5)):
        place = 16 * (row % 128 % 32) + 4 * (row % 128 // 32) + block % 4
        assert tiles[row // 128, block // 4, place] == scale[row, block]


def test_what_fills_tiles_up_is_no_nan() -> None:
    scale = torch.randint(0, 120, (130, 5)).to(torch.uint8)
    for dtype, filled in ((E4M3, 0.0), (E8M0, 1.0)):
        tiles = in_tiles(scale, dtype)
        assert tiles.shape == (256 * 8,)
        found = tiles.float().view(2, 2, 32, 4, 4)
        assert (found[1, 0, 2:] == filled).all()
        assert found[1, 1, 1, 0, 0] == scale[129, 4].view(dtype).float()


def test_what_makes_no_sense_is_refused() -> None:
    fp4 = QuantConfig(format="nvfp4", product="fp4")
    for config, said in (
        (replace(fp4, format="hif4"), "fp4 is for nvfp4, mxfp4: with hif4 choose fast$"),
        (replace(fp4, product="fp8"), "with nvfp4 choose fast or fp4$"),
        (replace(fp4, activations=ActivationConfig(format="e4m3")), "none of nvfp4 with e4m3, choose fast or exact"),
        (replace(fp4, weights=WeightConfig("per_channel")), "weights.granularity=per_channel: .* choose per_tensor"),
        (replace(fp4, activations=ActivationConfig("per_token")), "activations.granularity=per_token: .* per_tensor"),
        (
            replace(fp4, format="mxfp4", weights=WeightConfig(rule="amax/2")),
            "weights.rule=amax/2: fp4 takes no scales but the blocks', choose direct",
        ),
        (
            QuantConfig(format="hif4", activations=ActivationConfig(static=True)),
            "static=true: hif4 has no scale but the blocks', give a rule",
        ),
        (
            QuantConfig(format="bf16", activations=ActivationConfig(format="hif8")),
            "activations.format=hif8: quant.format=bf16 quantizes nothing, leave it out",
        ),
        (
            QuantConfig(format="hif4", activations=ActivationConfig(rule="amax/3", format="bf16")),
            "activations: bf16 has no scales, leave out rule and granularity",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            parse(config)
    nvfp4, mxfp4 = parse(fp4), parse(replace(fp4, format="mxfp4"))
    for scheme, found in ((nvfp4, (10, 0)), (nvfp4, (12, 1)), (mxfp4, (10, 3))):
        check_capability(scheme, found, "a card")
    with pytest.raises(
        ValueError, match=r"nvfp4 needs compute capability 10\.0 or newer, and a card has 9\.0: choose q"
    ):
        check_capability(nvfp4, (9, 0), "a card")
    for found in ((9, 0), (12, 0)):
        with pytest.raises(ValueError, match=r"mxfp4 needs compute capability 10\.0 or 10\.3, and a card has "):
            check_capability(mxfp4, found, "a card")


@pytest.mark.parametrize("which", CONFIGS)
def test_inputs_become_codes_in_one_graph(which: str) -> None:
    layer, x = layer_of(CONFIGS[which]), inputs()

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = encode_input(layer.scheme, x, layer.input_scale, None)
        return found.codes, found.blocks

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled(x), encode(x), strict=True))


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
@pytest.mark.parametrize(("format_", "product"), [("nvfp4", "fp4"), ("mxfp4", "fp4"), ("mxfp8", "fp8")])
def test_torch_takes_what_a_card_would_be_given(format_: str, product: str) -> None:
    """As far as shapes and types tell, without a card."""
    scheme = parse(QuantConfig(format=format_, product=product))
    bits = scheme.format.bits
    with FakeTensorMode():
        x = torch.empty(70, 192, dtype=torch.bfloat16, device="cuda")
        packed = torch.empty(160, scheme.format.row_bytes(192), dtype=torch.uint8, device="cuda")
        weight = of_packed(packed, 192, torch.ones((), device="cuda"), bits)
        bias = torch.empty(160, dtype=torch.float32, device="cuda")
        y = multiply(encode_input(scheme, x, None, None), weight, bias, bits)
        assert (y.shape, y.dtype, y.device.type) == ((70, 160), torch.bfloat16, "cuda")
