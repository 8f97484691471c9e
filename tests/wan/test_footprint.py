"""Predicted memory and time of running a model, beside what running it takes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.models import wan_transformer
from wanquant.quant import QuantConfig
from wanquant.quant.config import PRODUCTS
from wanquant.quant.scheme import parse
from wanquant.wan import tiny
from wanquant.wan.checkpoints.find import find_model
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig
from wanquant.wan.resources import probe, timing
from wanquant.wan.resources.empty import USUAL, Quantized
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts
from wanquant.wan.resources.footprint import Alive, decoding_bytes, denoising_bytes
from wanquant.wan.resources.printed import in_time
from wanquant.wan.resources.probe import block_seconds, decoding_seconds, is_small, learning_seconds, small_pass

CPU = torch.device("cpu")
#: 4,096 tokens, 1,024 wide: enough to tower above what a process takes anyway.
LARGE = GenerationConfig(256, 256, 61, 1, 1.0, 3.0, 32)
WIDE = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "text_dim": 32, "freq_dim": 64}
ALL = [name for name, child in wan_transformer(1).blocks[0].named_modules() if isinstance(child, torch.nn.Linear)]


def test_what_is_alive_is_counted() -> None:
    kept = torch.zeros(100)
    with Alive([kept]) as alive:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del a
        c = b.t() + kept[:10]
        del b, c
        torch.zeros(10)
    # The first two, or the last two, at once; views and what was there before cost nothing.
    assert alive.most == 8000


def measured(how: str) -> int:
    """Bytes that one forward pass, taken as jobs take it, adds to the peak of a process of its own, whose allocator
    keeps no freed pages."""
    code = f"""
import ctypes
for option in (-3, -1):  # from where on memory is mapped, and how much is kept
    assert ctypes.CDLL(None).mallopt(option, 65536)
import torch
torch.set_num_threads(1)
from diffusers import WanTransformer3DModel
from tests.wan.test_footprint import WIDE
from wanquant.quant import QuantConfig, quantize_
from wanquant.wan.device import forget_peak_memory, peak_memory
from wanquant.wan.products import quick_products
cpu = torch.device("cpu")
model = WanTransformer3DModel(num_layers=2, **WIDE).bfloat16()
if {how!r} != "bf16":
    quantize_(model, QuantConfig(packed={how!r} == "packed"), [1])
given = (torch.zeros(1, 16, 16, 32, 32).bfloat16(), torch.tensor([5.0]), torch.zeros(1, 32, 32).bfloat16())
with torch.no_grad(), quick_products(cpu):
    model(given[0][:, :, :1], *given[1:])  # for warmth
    forget_peak_memory(cpu)
    begun = peak_memory(cpu)
    model(*given)
print(peak_memory(cpu) - begun)
"""
    done = forked.run(["-c", code])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["packed", "bf16", "hif8"])
def test_a_pass_takes_what_was_predicted(how: str) -> None:
    quantized = None if how == "bf16" else Quantized(ALL, parse(QuantConfig(packed=how == "packed")))
    config = {**wan_transformer(1).config, **WIDE}
    predicted = denoising_bytes(config, quantized, LARGE, 1, CPU)
    assert predicted == pytest.approx(measured(how), rel=0.15)


def test_more_of_everything_takes_more() -> None:
    config = dict(wan_transformer(1).config)
    small = GenerationConfig(64, 64, 17, 1, 1.0, 3.0, 32)
    assert denoising_bytes(config, None, small, 4, CPU) > 3 * denoising_bytes(config, None, small, 1, CPU)
    vae = tiny.folder() / "vae"
    assert decoding_bytes(vae, GenerationConfig(128, 128, 17, 1)) > 3 * decoding_bytes(vae, small)


#: Formats and the products that they have.
OF_FORMAT = {
    "hif8": [product for product in PRODUCTS if product not in ("int8", "fp4")],
    "int8": ["fast", "exact", "int8"],
    "mxfp8": ["fast", "exact", "fp8"],
    "hif4": ["fast"],
    "nvfp4": ["fp4"],
}


@pytest.mark.parametrize(
    ("name", "product"),
    [
        pytest.param(name, product, marks=[pytest.mark.slow] * (name != "hif8" and product in ("fast", "exact")))
        for name, products in OF_FORMAT.items()
        for product in products
    ],
)
def test_every_quantization_has_a_footprint(name: str, product: str) -> None:
    """Of the chip's own product too, where there is no such chip; with plain torch kernels it needs more."""
    config = {**wan_transformer(1).config, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 128}
    quantized = Quantized(ALL, parse(QuantConfig(format=name, product=product)))
    found = [denoising_bytes(config, quantized, LARGE, 1, torch.device(kind)) for kind in ("cpu", "meta")]
    assert found[0] >= denoising_bytes(config, None, LARGE, 1, CPU)
    assert found[1] > found[0] or name != "hif8"


def test_rotating_inputs_takes_memory() -> None:
    """In float32, before and after."""
    config = {**wan_transformer(1).config, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512}
    plain, rotated = (
        denoising_bytes(config, Quantized(ALL, parse(QuantConfig(format="hif4", rotation=size))), LARGE, 1, CPU)
        for size in (None, 32)
    )
    assert rotated > 1.01 * plain


def test_a_cards_own_products_are_planned() -> None:
    """Exact ones of BF16 operands, in float32 until they are scaled; whole numbers as on the CPU."""
    config = {**wan_transformer(1).config, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 128}

    def bytes_of(format_: str, product: str, device: str) -> int:
        quantized = Quantized(ALL, parse(QuantConfig(format=format_, product=product)))
        return denoising_bytes(config, quantized, LARGE, 1, torch.device(device))

    tokens = math.prod(USUAL.latents(LARGE)) // 4
    assert bytes_of("hif8", "exact", "cuda") - bytes_of("hif8", "fast", "cuda") == 2 * tokens * 128
    assert bytes_of("hif8", "fp8", "cuda") == bytes_of("hif8", "fast", "cuda")
    assert bytes_of("int8", "int8", "cuda") == bytes_of("int8", "int8", "cpu") < bytes_of("int8", "fast", "cpu")


def test_what_is_probed_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by its number, attention by the square of the tokens, and a small case not at all."""
    seen: list[float] = []
    monkeypatch.setattr(probe, "measured", lambda run, device: seen.pop(0))
    config, vae = dict(wan_transformer(1).config), tiny.folder() / "vae"
    seen[:] = [2.0]
    assert block_seconds(config, None, 512, 32, 4, CPU) == 2.0
    # 512 tokens in 2 s, of which attention took 0.25 s: by 1,024 alone in 1 s.
    seen[:] = [2.0, 1.0]
    assert block_seconds(config, None, 4096, 32, 3, CPU) == pytest.approx(3 * (8 * 1.75 + 64 * 0.25))
    seen[:] = [5.0]
    settings = GenerationConfig(128, 128, 17, 1)
    assert decoding_seconds(vae, settings, CPU) == pytest.approx(5.0 * (17 * 16 * 16) / (5 * 8 * 8))
    seen[:] = [7.0]
    assert learning_seconds(config, lambda small: None, 4096, 32, 2, CPU, "fp32") == pytest.approx(7.0 * 4)


def test_on_a_busy_machine_it_is_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what else wants to run, by repetitions of a probe that differ, or by time it did not get."""
    monkeypatch.setattr(timing, "LONG_ENOUGH", 0.2)
    quiet = float(torch.get_num_threads())
    for load, busy in ((quiet, False), (quiet + 1, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        timing.begin()
        assert timing.is_busy() == busy
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    @timing.probed
    def probed(what: str) -> float:
        return timing.measured(lambda: time.sleep(0.05), CPU)

    for _ in range(2):  # also where it is known already
        timing.begin()
        assert probed("sleeps") > 0.04
        assert timing.is_busy()

    takes = [0.0, 0.01, 0.05, 0.05, 0.05, 0.05]  # the first is for warmth

    def uneven() -> None:
        end = time.process_time() + takes.pop(0)
        while time.process_time() < end:
            pass

    timing.begin()
    assert timing.measured(uneven, CPU) > 0.03
    assert timing.is_busy()


def test_small_models_are_run_with_all_there_is_around(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dict(wan_transformer(3).config)
    settings, quantized = GenerationConfig(64, 64, 17, 1, 2.0, 3.0, 32), Quantized(ALL, parse(QuantConfig()))
    assert small_pass(config, quantized, settings, 2, CPU) > 0
    # Of twenty blocks eight are run, besides what is around them.
    seen = [3.0, 1.0]
    monkeypatch.setattr(probe, "_pass_seconds", lambda *how: seen.pop(0))
    assert small_pass({**config, "num_layers": 20}, quantized, settings, 2, CPU) == 1 + (3 - 1) * 20 / 8
    assert is_small(config, 80, 2)
    assert not is_small({**config, "num_attention_heads": 40, "attention_head_dim": 128}, 80, 2)
    assert not is_small(config, 32_760, 1)


def test_a_plan_of_the_true_size_needs_no_weights(tmp_path: Path) -> None:
    """From JSON files alone: 14B at 480p."""
    from diffusers import WanTransformer3DModel

    from benchmarks.random_wan import SHAPES

    for name in ("vae", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny.folder() / name / "config.json").read_text())
    (tmp_path / "model_index.json").write_text("{}")
    with torch.device("meta"):
        WanTransformer3DModel(**SHAPES["14b"]).save_config(tmp_path / "transformer")
    settings = GenerationConfig(480, 832, 81, 50)
    how = (parse(QuantConfig()), [0, 1, -3, -2, -1], (), settings, VideoCounts(1, 1, 0, 2), 1)
    card, host = (ResourceEstimate(ModelFiles.of(tmp_path), *how, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert card.parameters == pytest.approx(14.3e9, rel=0.01)
    assert card.packed / (2 * card.parameters) == pytest.approx(0.572, abs=0.005)
    assert 3.5e9 < card.activations < 4.5e9  # of denoising
    assert card.added == pytest.approx(28.6e9 + card.others + card.activations, rel=0.01)
    # On a host the quantized weights come beside the mapped files, and two videos in float32.
    beside = (host.added - host.activations) - (card.added - card.activations)
    assert beside == host.quantized_weights * 2 + 2 * 12 * 81 * 480 * 832


@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29e9, 40),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.419e9, 30),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 28.58e9, 80),
    ],
)
def test_the_shapes_of_the_hubs_models_come_along(name: str, parameters: float, blocks: int) -> None:
    """So that a plan needs no network."""
    how = (parse(QuantConfig()), [], (), GenerationConfig(), VideoCounts(1, 0, 1), 1, CPU)
    plan = ResourceEstimate(find_model(name, shapes_only=True), *how)
    assert plan.parameters == pytest.approx(parameters, rel=1e-3)
    assert plan.report.blocks == blocks
    assert plan.text_encoder[1] == 2 * 4096 * (256_384 + 4096)  # words, and what reads them
    assert plan.others == pytest.approx(2 * 5.68e9 + 4 * 127e6, rel=0.01)


@pytest.mark.slow
def test_the_sums_of_docs_ascend() -> None:
    """What a card needs for the 14B at 480p, as the table there has it."""
    text = (Path(__file__).parents[2] / "docs" / "ascend.md").read_text(encoding="utf-8")
    files = find_model("Wan-AI/Wan2.1-T2V-14B-Diffusers", shapes_only=True)

    def plan(packed: bool, beside: bool) -> ResourceEstimate:
        how = (GenerationConfig(480, 832, 81, 50), VideoCounts(1, 1, 2, 2, beside), 1, torch.device("meta"))
        return ResourceEstimate(files, parse(QuantConfig(packed=packed)), [0, 1, -3, -2, -1], (), *how)

    one, copies = plan(False, False), [plan(packed, True).added / 1e9 for packed in (True, False)]
    assert f"| {2 * one.parameters / 1e9:.1f}; {one.packed / 1e9:.1f} |" in text
    assert f"| {one.others / 1e9:.1f} |" in text
    assert f"| {one.added / 1e9:.0f} |" in text
    assert f"| {copies[0]:.0f}; {copies[1]:.0f} |" in text
    config = dict(one.shape.config)
    denoising = denoising_bytes(config, Quantized(ALL, parse(QuantConfig())), one.settings, 1, one.device)
    assert f"| {denoising / 1e9:.1f}; {decoding_bytes(files.folder / 'vae', one.settings) / 1e9:.1f} |" in text


def test_times_are_said_as_people_say_them() -> None:
    assert [in_time(seconds) for seconds in (0.4, 119, 600, 86400, 1.3e6, 1.1e8)] == [
        "0.4 s",
        "119 s",
        "10 min",
        "24.0 h",
        "15.0 days",
        "3.5 years",
    ]
