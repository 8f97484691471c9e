"""What a plan predicts is what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from wanquant.qat.check import training_of
from wanquant.qat.config import QATConfig, TrainConfig
from wanquant.qat.plan import count_trained, plan_training, shrinks
from wanquant.qat.scope import choose_
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig
from wanquant.quant.convert import make_trainable_
from wanquant.wan.config import GenerationConfig
from wanquant.wan.resources.footprint import kept_by

STATIC = QuantConfig(activations=ActivationConfig("per_tensor", static=True))
SHAPE = {"num_attention_heads": 3, "attention_head_dim": 24, "ffn_dim": 160, "text_dim": 32, "freq_dim": 64}


def transformer(blocks: int = 1) -> WanTransformer3DModel:
    return WanTransformer3DModel(num_layers=blocks, **SHAPE)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("quantize", [True, False])
def test_bytes_of_a_block_are_those_autograd_keeps(precision: str, quantize: bool) -> None:
    """For another width, length and text than those they were found with; the weights' own copies apart."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32

    def prepare(model: WanTransformer3DModel) -> None:
        if quantize:
            make_trainable_(model, QuantConfig())

    model = transformer()
    kept = kept_by(dict(model.config), prepare, precision)
    prepare(model)
    block, found = model.blocks[0], []
    for frames, text in ((3, 12), (6, 12), (3, 24)):
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, torch.UntypedStorage] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        rotary = model.rope(torch.zeros(1, 1, frames, 8, 8))
        hidden = torch.randn(1, 16 * frames, 72, dtype=kind, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            output = block(hidden, torch.randn(1, text, 72, dtype=kind), torch.randn(1, 6, 72), rotary)
        found.append(sum(storage.nbytes() for storage in seen.values()))
        del output
    predicted = [kept.bytes(3, 160, 16 * frames, text) for frames, text in ((3, 12), (6, 12), (3, 24))]
    assert found[1] - found[0] == pytest.approx(predicted[1] - predicted[0], rel=0.02)
    assert found[2] - found[0] == pytest.approx(predicted[2] - predicted[0], rel=0.05)


@pytest.mark.parametrize(
    "qat",
    [
        QATConfig(scope="all"),
        QATConfig(scope="blocks", blocks=[1, -1]),
        QATConfig(scope="norms", blocks=[2]),
        QATConfig(scope="scales"),
        QATConfig(scope="lora"),
    ],
    ids=lambda qat: qat.scope,
)
def test_counted_is_what_is_trained(qat: QATConfig) -> None:
    config = TrainConfig(qat=qat, quant=STATIC)
    model = transformer(4)
    expected = count_trained(model, config)
    seen = {name: 1.0 for name, _ in model.named_modules()}
    make_trainable_(model, STATIC, (), (), seen, training_of(qat))
    trained = choose_(model, qat.scope, qat.blocks, qat.lora.rank, qat.lora.alpha)
    assert sum(parameter.numel() for parameter in trained) == expected


def test_a_plan_knows_what_each_choice_costs() -> None:
    model, config = transformer(4), TrainConfig(qat=QATConfig(scope="all", ema=0.9))
    config.model.generation = GenerationConfig(max_text_length=32)

    def total(**changes: object) -> int:
        changed = replace(config, qat=replace(config.qat, **changes))
        return plan_training(model, changed, 64, 100, "bf16").total

    parameters = sum(p.numel() for p in model.parameters())
    whole = plan_training(model, config, 64, 100, "bf16")
    assert (whole.gradients, whole.optimizer, whole.average) == (4 * parameters, 8 * parameters, 4 * parameters)
    assert whole.host == 0
    assert total(ema=0.0) == whole.total - 4 * parameters
    assert total(accumulation=2) == pytest.approx(whole.total - whole.activations / 2)
    assert total(recompute=True) < whole.total - whole.activations / 2
    assert total(scope="lora") < total(scope="all")
    assert total(scope="blockwise") < total(scope="lora")
    assert shrinks(config) == "qat.accumulation=2, qat.recompute=true, qat.ema=0, qat.scope=lora, qat.scope=blockwise"
    assert plan_training(model, replace(config, qat=QATConfig()), 64, 100, "bf16").host > 0


def test_fewer_samples_take_less_beside_the_device() -> None:
    model = transformer(4)
    few, all_ = (
        plan_training(model, TrainConfig(qat=QATConfig(samples=count)), 64, 1000, "bf16") for count in (100, 0)
    )
    assert few.host * 10 == all_.host
    assert few.total == all_.total
