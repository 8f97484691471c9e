"""Block after block: what enters is what the model would see, and no block gets worse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import wan_transformer
from wanquant.qat.blockwise import Blockwise, record_block_inputs, set_aside, trainable_block
from wanquant.qat.config import LoopConfig, LossConfig, make_rate
from wanquant.qat.data import Batch
from wanquant.qat.loop import Loop, Loss, make_accelerator
from wanquant.qat.loss import Objective, relative_error
from wanquant.quant import QuantConfig, quantize_
from wanquant.quant.convert import freeze_into_, make_trainable_
from wanquant.quant.scheme import parse
from wanquant.quant.trainable import Training

CPU = torch.device("cpu")


class Asked:
    """Random samples, four of each video."""

    def __init__(self, count: int = 20) -> None:
        generator = torch.Generator().manual_seed(3)
        self.noisy = torch.randn(count, 16, 2, 4, 4, generator=generator).bfloat16()
        self.timestep = 1000 * torch.rand(count, generator=generator)
        self.text = torch.randn(count, 6, 32, generator=generator).bfloat16()

    def video_of(self, place: int) -> int:
        return place // 4

    def of(self, places: range) -> Batch:
        rows = torch.as_tensor(list(places))
        return Batch(self.noisy[rows], self.timestep[rows], self.text[rows])


@pytest.mark.parametrize("attention", ["off", "qkv", "qkvp"])
def test_a_trainable_model_computes_what_the_quantized_does(attention: str) -> None:
    """To the bit, and so does what it is frozen to; the gradients of all its parameters are finite and not zero."""
    config = QuantConfig(attention=attention)
    plain = wan_transformer()
    quantized, trainable, frozen = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    quantize_(quantized, config, (0,))
    make_trainable_(trainable, config, (0,))
    asked = Asked(3)
    given = asked.noisy, asked.timestep, asked.text
    expected = quantized(*given, return_dict=False)[0]
    found = trainable(*given, return_dict=False)[0]
    assert torch.equal(found, expected)
    freeze_into_(frozen, trainable)
    assert torch.equal(frozen(*given, return_dict=False)[0], expected)
    found.float().square().mean().backward()
    for name, parameter in trainable.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "norm_k" in name or name.endswith("to_k.bias"), name


def the_same() -> nn.Module:
    torch.manual_seed(0)
    return wan_transformer()


def make(index: int, block: nn.Module) -> nn.Module | None:
    return trainable_block(block, index, parse(QuantConfig()), (), {}, Training()) if index else None


def blockwise(folder: Path, lr: float, chosen: tuple[int, ...] = (1, 2, 3)) -> tuple[nn.Module, Blockwise]:
    transformer = the_same()
    inputs = record_block_inputs(transformer, Asked(), range(20), CPU)  # type: ignore[arg-type]
    accelerator, config = make_accelerator(CPU, "bf16"), LoopConfig(8, 8, save_every=3)

    def new_loop(block: nn.Module, loss: Loss, states: Path, index: int) -> Loop:
        optimizer, rate = torch.optim.AdamW(block.parameters(), lr=lr), make_rate("constant", 8)
        return Loop(accelerator, block, [optimizer], rate, loss, config, states, f"recipe block {index}")

    return transformer, Blockwise(accelerator, transformer, inputs, make, chosen, new_loop, config, folder)


def test_what_enters_a_block_is_what_the_model_sees(tmp_path: Path) -> None:
    transformer, made = blockwise(tmp_path, 1e-4)
    reference, seen = copy.deepcopy(transformer), []
    handle = reference.blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    made.run()
    asked = Asked()
    with torch.no_grad():
        reference(asked.noisy, asked.timestep, asked.text)
    torch.testing.assert_close(made.inputs.bf16, seen[0], rtol=0.02, atol=0.02)
    handle.remove()
    transformer.blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        transformer(asked.noisy, asked.timestep, asked.text)
    torch.testing.assert_close(made.inputs.quantized, seen[1], rtol=0.02, atol=0.02)


def test_no_block_gets_worse_on_what_was_set_aside(tmp_path: Path) -> None:
    _, made = blockwise(tmp_path / "good", 1e-4)
    rows = made.run()
    assert [row["block"] for row in rows] == [1, 2, 3]
    assert any(row["kept"] for row in rows)
    assert all(row["kept"] == (row["after"] < row["before"]) for row in rows)
    spoilt, made = blockwise(tmp_path / "bad", 10.0)
    assert not any(row["kept"] for row in made.run())
    plain = the_same()
    quantize_(plain, QuantConfig(), (0,))
    for (name, a), b in zip(plain.state_dict().items(), spoilt.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_blocks_that_are_not_chosen_are_quantized_as_they_are(tmp_path: Path) -> None:
    transformer, made = blockwise(tmp_path, 1e-4, chosen=(2,))
    assert [row["block"] for row in made.run()] == [2]
    plain = the_same()
    quantize_(plain, QuantConfig(), (0,))
    for index in (0, 1, 3):
        pairs = zip(
            plain.blocks[index].state_dict().values(), transformer.blocks[index].state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_finished_block_is_not_trained_again(tmp_path: Path) -> None:
    transformer, made = blockwise(tmp_path, 1e-4)
    rows = made.run()
    again, made = blockwise(tmp_path, 1e-4)
    (tmp_path / "block-003" / "row.json").unlink()  # the last was not finished
    assert made.run() == rows
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), again.parameters(), strict=True))


def test_losses_by_hand() -> None:
    student, teacher = wan_transformer(2), wan_transformer(2)
    asked = Asked(4)
    velocity = torch.randn(4, 16, 2, 4, 4)
    batch = Batch(asked.noisy, asked.timestep, asked.text, velocity, output=torch.zeros(4))
    found = Objective(LossConfig(1.0, 0.5, 0.25), None, 4, CPU, teacher).of(student, batch)  # type: ignore[arg-type]
    with torch.no_grad():
        ours, theirs = (m(asked.noisy, asked.timestep, asked.text, return_dict=False)[0] for m in (student, teacher))
    flow = ((ours - velocity).square().flatten(1).sum(1) / velocity.square().flatten(1).sum(1)).mean()
    output = ((ours - theirs).float().square().flatten(1).sum(1) / theirs.float().square().flatten(1).sum(1)).mean()
    torch.testing.assert_close(found["flow"].detach(), flow, rtol=1e-2, atol=0)
    torch.testing.assert_close(found["output"].detach(), output, rtol=1e-2, atol=0)
    total = found["flow"] + 0.5 * found["output"] + 0.25 * found["blocks"]
    torch.testing.assert_close(found["loss"], total)
    assert not Objective(LossConfig(0, 1, 1), None, 4, CPU, student).of(student, batch)["loss"]  # type: ignore[arg-type]
    assert relative_error(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [1, 1]


def test_whole_videos_are_set_aside() -> None:
    asked = Asked(80)
    assert set_aside(asked, range(80)) == {*range(4), *range(32, 36), *range(64, 68)}  # type: ignore[arg-type]
    assert set_aside(asked, [5, 6, 40]) == {0, 1}  # type: ignore[arg-type]
