"""A model of two quantized blocks that learns a fixed map, for the loop's tests; run as a script it trains to its end.

python -m tests.qat.small <folder> <file of the curves> [steps] [batch]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from wanquant.qat.config import LoopConfig, make_rate
from wanquant.qat.loop import Hooks, Loop, make_accelerator
from wanquant.quant import QuantConfig
from wanquant.quant.convert import make_trainable_
from wanquant.quant.trainable import Training

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.last(x)
        return out


def quantized(how: Training | None = None) -> Small:
    model = Small()
    make_trainable_(model, QuantConfig(product="exact"), how=how)
    return model


def loss(model: nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
    """The same rows whoever asks for them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)[rows.start : rows.stop]
    error = (model(x) - x.roll(1, 1)).square().mean()
    return {"loss": 2 * error, "error": error}


def config(steps: int = 12, **more: object) -> LoopConfig:
    return LoopConfig(**{"steps": steps, "batch": 8, "ema": 0.9, "save_every": 5, **more})  # type: ignore[arg-type]


def loop(folder: Path, plan: LoopConfig | None = None, model: nn.Module | None = None, precision: str = "fp32") -> Loop:
    plan = plan or config()
    model = model or quantized(Training(gradients="stochastic"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    accelerator = make_accelerator(CPU, precision, plan.accumulation)
    return Loop(accelerator, model, [optimizer], make_rate("cosine", plan.steps, 2), loss, plan, folder, "recipe")


def main() -> None:
    folder, out, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    steps, batch = (int(number) for number in [*numbers, "12", "8"][:2])
    made = loop(Path(folder), config(steps, batch=batch), quantized())
    slow = Hooks(show=lambda row: time.sleep(0.01))
    curves = made.run(hooks=slow)
    if made.accelerator.is_main_process:
        values = [p.detach().double().sum().item() for p in made.release().parameters()]
        assert made.average is not None
        averages = [value.double().sum().item() for value in made.average.values]
        Path(out).write_text(json.dumps({"rows": curves.rows, "weights": values, "averages": averages}))


if __name__ == "__main__":
    main()
