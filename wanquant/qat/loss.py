"""The losses of training a whole model. Errors are relative, so that no noise level and no block drowns the others:

    flow     |v - (e - x_0)|² / |e - x_0|²        on videos
    output   |v - v'|² / |v'|²                    v' BF16's output
    blocks   the mean over blocks of |h - h'|² / |h'|²

each a mean over the rows of the batch, and the loss their weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wanquant.qat.config import LossConfig
from wanquant.qat.data import Batch, Source


def needs_teacher(config: LossConfig, source: str) -> bool:
    """Whether BF16 has to run in every step: its outputs along its own trajectories are known."""
    return bool(config.blocks) or (bool(config.output) and source != "trajectories")


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|found - wanted|² / |wanted|² of each row, in float32."""
    found, wanted = found.float().flatten(1), wanted.float().flatten(1)
    return (found - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass
class Objective:
    """The loss and its parts of a model on the source's rows, of batches of ``size``. ``teacher`` is the BF16 model,
    where it is needed."""

    config: LossConfig
    source: Source
    size: int
    device: torch.device
    teacher: nn.Module | None = None

    def __call__(self, model: nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
        return self.of(model, self.source.batch(step, self.size, rows))

    def of(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        config, hidden = self.config, list[torch.Tensor]()
        noisy, timestep, text = (t.to(self.device) for t in (batch.noisy, batch.timestep, batch.text))
        with _outputs(model if config.blocks else None, hidden):
            velocity = predict_velocity(model, noisy, timestep, text)
        output, theirs = batch.output, list[torch.Tensor]()
        if self.teacher is not None:
            with torch.no_grad(), _outputs(self.teacher if config.blocks else None, theirs):
                output = predict_velocity(self.teacher, noisy, timestep, text)
        parts: dict[str, torch.Tensor] = {}
        if config.flow:
            assert batch.velocity is not None
            parts["flow"] = relative_error(velocity, batch.velocity.to(self.device)).mean()
        if config.output:
            assert output is not None
            parts["output"] = relative_error(velocity, output.to(self.device)).mean()
        if config.blocks:
            errors = [relative_error(ours, wanted) for ours, wanted in zip(hidden, theirs, strict=True)]
            parts["blocks"] = torch.stack(errors).mean()
        total = torch.stack([getattr(config, name) * value for name, value in parts.items()]).sum()
        return {"loss": total, **parts}


def predict_velocity(model: nn.Module, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A Wan transformer's velocity, its inputs rounded to BF16 as the pipeline does, in the model's own type."""
    bare: Any = getattr(model, "module", model)
    kind = bare.patch_embedding.weight.dtype
    noisy, text = (tensor.to(torch.bfloat16).to(kind) for tensor in (noisy, text))
    velocity: torch.Tensor = model(noisy, timestep, text, return_dict=False)[0]
    return velocity


@contextmanager
def _outputs(model: nn.Module | None, into: list[torch.Tensor]) -> Iterator[None]:
    """Collects the blocks' outputs, in their order."""
    blocks: Any = [] if model is None else getattr(model, "module", model).blocks

    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        into.append(output)

    with ExitStack() as handles:
        for block in blocks:
            handles.enter_context(block.register_forward_hook(hook))
        yield
