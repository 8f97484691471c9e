"""What a plan predicts is what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from wanquant.ptq.plan import SourceModel
from wanquant.qat.config import QATConfig
from wanquant.qat.estimate import count_trained, estimate_memory, shrinks
from wanquant.qat.plan import TrainPlan, training_of
from wanquant.qat.scope import choose_
from wanquant.qat.train_config import TrainConfig
from wanquant.quant import QuantConfig
from wanquant.quant.config import ActivationConfig
from wanquant.quant.convert import make_trainable_
from wanquant.quant.scheme import parse
from wanquant.quant.select import resolve_blocks
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig, ModelConfig
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


def plan_of(
    model: WanTransformer3DModel, qat: QATConfig, quant: QuantConfig | None = None, videos: int = 0
) -> TrainPlan:
    """With nothing protected; a video is of 64 tokens, with 32 of text, and two steps."""
    generation = GenerationConfig(64, 64, 13, 2, 1.0, 3.0, 32, 8)
    config = TrainConfig(model=ModelConfig(generation=generation), quant=quant or QuantConfig(), qat=qat)
    source, pairs = (
        SourceModel(ModelFiles(Path(), {}), model, 1, (), ()),
        tuple(("a prompt", seed) for seed in range(videos)),
    )
    blocks = resolve_blocks(qat.blocks or range(source.blocks), source.blocks)
    rest = (torch.device("cpu"), (), (), {}, pairs, training_of(qat), blocks)
    return TrainPlan(config, parse(config.quant), source, *rest)


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
    model = transformer(4)
    plan = plan_of(model, qat, STATIC)
    expected = count_trained(plan)
    seen = {name: 1.0 for name, _ in model.named_modules()}
    make_trainable_(model, plan.scheme, (), (), seen, plan.training)
    trained = choose_(model, qat.scope, plan.chosen, qat.lora.rank, qat.lora.alpha)
    assert sum(parameter.numel() for parameter in trained) == expected


def test_a_plan_knows_what_each_choice_costs() -> None:
    model, given = transformer(4), {"scope": "all", "ema": 0.9, "precision": "bf16"}

    def total(**changes: object) -> int:
        return estimate_memory(plan_of(model, QATConfig(**{**given, **changes}))).total  # type: ignore[arg-type]

    parameters = sum(p.numel() for p in model.parameters())
    plan = plan_of(model, QATConfig(**given))  # type: ignore[arg-type]
    whole = estimate_memory(plan)
    assert (whole.gradients, whole.optimizer, whole.average) == (4 * parameters, 8 * parameters, 4 * parameters)
    assert whole.host == 0
    assert total(ema=0.0) == whole.total - 4 * parameters
    assert total(accumulation=2) == pytest.approx(whole.total - whole.activations / 2)
    assert total(recompute=True) < whole.total - whole.activations / 2
    assert total(scope="lora") < total(scope="all")
    assert total(scope="blockwise") < total(scope="lora")
    assert shrinks(plan.qat) == (
        "qat.accumulation=2, qat.recompute=true, qat.ema=0, qat.scope=lora, qat.scope=blockwise"
    )
    assert estimate_memory(plan_of(model, QATConfig(precision="bf16"), videos=50)).host > 0


def test_fewer_samples_take_less_beside_the_device() -> None:
    model = transformer(4)
    few, all_ = (
        estimate_memory(plan_of(model, QATConfig(samples=count, precision="bf16"), videos=500)) for count in (100, 0)
    )
    assert few.host * 10 == all_.host
    assert few.total == all_.total
