"""Models whose weights wait on the host or in files: the same numbers, and no more memory than was predicted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig
from torch import nn

from tests import forked
from tests.jobs import short
from tests.models import wan_inputs, wan_transformer
from tests.wan.test_footprint import ALL, WIDE
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import generate
from wanquant.wan.load import Pipeline
from wanquant.wan.resources import placement as module
from wanquant.wan.resources.footprint import Alive, Quantized, denoising_bytes
from wanquant.wan.resources.offload import Sizes, ways_of
from wanquant.wan.resources.placement import Placement, placement_of, streamed

CPU = torch.device("cpu")
PAIR = ("a red circle moving right on a black background", 1)
SETTINGS = GenerationConfig(64, 64, 5, 2, 2.0, 3.0, 64, 8)


def latents(pipe: Pipeline) -> torch.Tensor:
    return generate(pipe, [PAIR], SETTINGS, decode=False)[0].latents


def hooked(transformer: nn.Module) -> list[str]:
    return [name for name, child in transformer.named_modules() if hasattr(child, "_diffusers_hook")]


@pytest.mark.parametrize("way", ["group", "disk"])
def test_the_numbers_are_the_same(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BF16, of what is quantized in place, and of what was saved, bit for bit and to the last count."""
    monkeypatch.setattr(module, "LARGE", 1 << 10)
    place, scheme = Placement(CPU, way, tmp_path / "files"), QuantConfig()
    there, waits = load_pipeline(short(3), "cpu"), load_pipeline(short(3), placement=place)
    assert torch.equal(latents(waits), latents(there))
    quantize_(there.transformer, scheme, (0,))
    quantize_(waits.transformer, scheme, (0,), device=CPU, keep=place.keep_)
    wanted = latents(there)
    assert torch.equal(latents(waits), wanted)
    counts = [[int(x.overflowed) for x in quantized_linears(pipe.transformer).values()] for pipe in (there, waits)]
    assert counts[0] == counts[1]
    made = [
        waits.transformer.blocks[1].ffn.net[2].weight,
        waits.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight,
    ]
    assert [tensor.untyped_storage().filename is not None for tensor in made] == [way == "disk"] * 2
    assert not list(place.folder.iterdir()) if way == "disk" else not (tmp_path / "files").exists()
    again = load_pipeline(save_quantized(waits, tmp_path / "saved"), placement=place)
    assert quantized_linears(again.transformer)["blocks.1.ffn.net.2"].is_packed
    assert torch.equal(latents(again), wanted)


def test_a_checkpoint_in_float32_is_cast_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1 << 10)
    wan_transformer(2, torch.float32).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    found = Placement(CPU, "disk", tmp_path / "files").read(WanTransformer3DModel, tmp_path / "model")
    wanted = WanTransformer3DModel.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in found.state_dict().items()} == {
        name: tensor.dtype for name, tensor in wanted.state_dict().items()
    }
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    given = wan_inputs()
    with torch.no_grad():
        assert torch.equal(found(**given, return_dict=False)[0], wanted(**given, return_dict=False)[0])


def test_hooks_are_there_only_while_it_runs() -> None:
    transformer = Placement(CPU, "group").put_(wan_transformer(2))
    with streamed([transformer]):
        assert hooked(transformer) == ["", "blocks.0", "blocks.1"]
    assert not hooked(transformer)
    with pytest.raises(RuntimeError, match="halfway"), streamed([transformer]):
        raise RuntimeError("halfway")
    assert not hooked(copy.deepcopy(transformer))
    assert placement_of(copy.deepcopy(transformer)).way == "group"
    plain = wan_transformer(2)
    with streamed([plain]):
        assert not hooked(plain)


def test_what_is_counted_is_kept_when_a_layer_is_offloaded(tmp_path: Path) -> None:
    """diffusers puts buffers back as they were when they first left, and from the disk as nothing at all."""
    transformer = wan_transformer(2)
    quantize_(transformer, QuantConfig(format="int8", product="int8"))
    given = wan_inputs()
    where = {"onload_device": CPU, "offload_device": CPU, "offload_type": "block_level", "num_blocks_per_group": 1}

    def lost(model: nn.Module) -> list[list[int]]:
        return [layer.lost.tolist() for layer in quantized_linears(model).values()]

    with torch.no_grad():
        transformer(**given)
        before = lost(transformer)
        assert before[0][1] > 0
        transformer.enable_group_offload(**where, offload_to_disk_path=str(tmp_path))
        transformer(**given)
    assert lost(transformer) == [[2 * count for count in layer] for layer in before]


def test_codes_do_not_stay_on_the_device() -> None:
    transformer = wan_transformer(2)
    quantize_(transformer, QuantConfig(product="fp8"), device=CPU, keep=Placement(CPU, "group").keep_)
    Placement(CPU, "group").put_(transformer)
    with streamed([transformer]), torch.no_grad():
        transformer(**wan_inputs())
    assert all(layer._coded is None for layer in quantized_linears(transformer).values())


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a card: diffusers brings the weights by a stream of torch's for CPUs, to copies of them."""

    def apply(transformer: nn.Module, **how: Any) -> None:
        config = GroupOffloadingConfig(
            **how, non_blocking=True, record_stream=False, low_cpu_mem_usage=True, stream=torch.cpu.Stream()
        )
        group_offloading._apply_group_offloading(transformer, config)

    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(module, "apply_group_offloading", apply)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(None, id="bf16", marks=pytest.mark.slow),
        pytest.param(Quantized(ALL, parse(QuantConfig(packed=True))), id="packed"),
    ],
)
def test_a_card_holds_two_blocks(how: Quantized | None) -> None:
    settings = GenerationConfig(64, 64, 17, 1, 1.0, 3.0, 32)
    model = WanTransformer3DModel(num_layers=6, **{**WIDE, "num_attention_heads": 4, "ffn_dim": 2048}).bfloat16().eval()
    if how is not None:
        quantize_(model, how.scheme)
    inputs = (torch.randn(1, 16, 5, 8, 8).bfloat16(), torch.tensor([500.0]), torch.randn(1, 32, 32).bfloat16())
    with torch.no_grad():
        wanted = model(*inputs, return_dict=False)[0]
        before = [int(layer.overflowed) for layer in quantized_linears(model).values()]
        Placement(CPU, "group").put_(model)
        with streamed([model]), Alive([*model.parameters(), *model.buffers()]) as alive:
            outputs = [model(*inputs, return_dict=False)[0] for _ in range(2)]
    assert all(torch.equal(output, wanted) for output in outputs)
    assert [int(layer.overflowed) for layer in quantized_linears(model).values()] == [3 * count for count in before]
    around = sum(t.nbytes for name, t in model.state_dict().items() if not name.startswith("blocks"))
    block = sum(t.nbytes for t in model.blocks[0].state_dict().values())
    denoising = denoising_bytes(dict(model.config), how, settings, 1, torch.device("cuda"))
    predicted = ways_of(Sizes(6 * block + around, around, block, 0, 0, 0, denoising, 0))["group"].card
    # What is around the blocks is moved without a stream, which makes no copy here.
    assert predicted == pytest.approx(alive.most + around, rel=0.1)
    assert predicted < 0.6 * (6 * block + around + denoising)


@pytest.mark.slow  # a model of 134 million weights
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what is in files is told apart by Linux")
def test_from_the_disk_it_takes_what_was_predicted(tmp_path: Path) -> None:
    """Memory that cannot be given up, of a process of its own; the checkpoint is in float32, and cast on the way."""
    code = f"""
import ctypes, threading, time
from pathlib import Path
for option in (-3, -1):  # from where on memory is mapped, and how much is kept
    assert ctypes.CDLL(None).mallopt(option, 65536)
import torch
torch.set_num_threads(1)
from wanquant import load_pipeline
from wanquant.quant import QuantConfig, quantize_
from wanquant.quant.scheme import parse
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import generate
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts
from wanquant.wan.resources.placement import Placement
from tests.wan.test_placement import PAIR
settings, cpu = GenerationConfig(256, 256, 33, 1, 1.0, 3.0, 32), torch.device("cpu")
generate(load_pipeline("tiny", "cpu"), [PAIR], GenerationConfig(64, 64, 5, 1, 1.0, 3.0, 32))  # for warmth
def now():
    return 1024 * int(next(line for line in Path("/proc/self/status").open() if "RssAnon" in line).split()[1])
begun, most, done = now(), [0], threading.Event()
def watch():
    while not done.is_set():
        most[0] = max(most[0], now())
        time.sleep(0.002)
watching = threading.Thread(target=watch)
watching.start()
placement = Placement(cpu, "disk", Path({str(tmp_path / "files")!r}))
folder, scheme = Path({str(tmp_path / "model")!r}), QuantConfig(packed=True)
pipe = load_pipeline(folder, placement=placement)
quantize_(pipe.transformer, scheme, (0,), device=cpu, keep=placement.keep_)
generate(pipe, [PAIR], settings, decode=False)
done.set()
watching.join()
counts, files = VideoCounts(0, 1), ModelFiles.of(folder)
print(most[0] - begun, ResourceEstimate(files, parse(scheme), (0,), (), settings, counts, 1, cpu).ways["disk"].card)
"""
    pipe = load_pipeline("tiny", "cpu")
    pipe.transformer = WanTransformer3DModel(num_layers=8, **{**WIDE, "text_dim": pipe.transformer.config.text_dim})
    pipe.save_pretrained(tmp_path / "model")
    del pipe
    done = forked.run(["-c", code])
    assert done.returncode == 0, done.stderr
    measured, predicted = map(int, done.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)
    assert predicted < 0.7 * 2 * 134_000_000
