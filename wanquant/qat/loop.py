"""The training loop: whatever is trained here is trained by it, the tiny-wan that ships as well.

A step is a function of its number and of the weights before it: whoever computes the loss draws the data of (seed,
step), and torch's generators are seeded from them anew. So there is no position in the data and no state of a generator
to lose, and a run that was killed goes on with what an uninterrupted one would have seen.

A global batch is ``config.batch`` rows; each process takes its share of them, in ``config.accumulation`` parts, and
gradients are means over all. accelerate places, casts, accumulates, clips and reduces; under ``accelerate launch``
several processes compute what one would, but for the order of sums.

States are folders ``state-<steps done>``, written under another name and renamed when whole. What is not finite, or
grows without end, stops the run before it reaches the weights, and is traced to the layer where it began.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import nn

from wanquant.qat.config import LoopConfig, Rate
from wanquant.qat.state import LOOP_FILE, Average, gather_, last_state, new_state, shard_on_cpu_, states_in
from wanquant.runs.progress import Tick, progress

#: Losses that are compared to say that they grow: the last so many, and the lowest mean of so many before.
WINDOW = 10
Row = dict[str, Any]


class TrainingStopped(ValueError):
    """A loss that is not finite, or that grows without end; the message says where it began."""


@dataclass
class Hooks:
    """What happens beside a step. ``before`` it; ``after`` it, which may add to its row; ``check``, after every
    ``check_every`` steps and the last, gives a row of its own; ``show`` is called with both kinds of row."""

    before: Callable[[int], None] = lambda step: None
    after: Callable[[int], Row] = lambda step: {}
    check: Callable[[int], Row] | None = None
    check_every: int = 0
    show: Callable[[Row], None] = lambda row: None


@dataclass
class Curves:
    """``rows`` of every step: loss and its parts, learning rate, gradient norms; ``checks`` of some."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)


#: (model, step, rows of the global batch) to the loss, a mean over these rows, under ``loss``, and its parts.
Loss = Callable[[nn.Module, int, range], dict[str, torch.Tensor]]


def make_accelerator(device: torch.device, precision: str = "fp32", accumulation: int = 1) -> Accelerator:
    """``precision`` is ``bf16`` or ``fp32``, of the products; weights and gradients are float32 either way."""
    AcceleratorState._reset_state()  # a process may train several times, each in its own precision
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # one process makes data while the others wait
    mixed = "bf16" if precision == "bf16" else "no"
    how = {"cpu": device.type == "cpu", "mixed_precision": mixed, "gradient_accumulation_steps": accumulation}
    return shard_on_cpu_(Accelerator(kwargs_handlers=[patience], **how))


def quiet(note: str = "") -> None:
    """The tick of a process that shows no progress."""


class Loop:
    """Prepares ``model`` and ``optimizers``, whose learning rates are the highest they will have, and takes up the
    last state in ``folder``, if there is one.

    recipe   what the training is a function of: a state of another one is refused
    apart    parameters whose gradients are clipped apart from the others'; all together unless given
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rate: Rate,
        loss: Loss,
        config: LoopConfig,
        folder: Path,
        recipe: str,
        apart: Sequence[Sequence[nn.Parameter]] = (),
    ) -> None:
        shares = accelerator.num_processes * config.accumulation
        if config.batch % shares:
            raise ValueError(
                f"a batch of {config.batch} does not divide into {shares} ({accelerator.num_processes} processes "
                f"times {config.accumulation} parts)"
            )
        self.accelerator, self.config, self.folder, self.recipe = accelerator, config, folder, recipe
        self.rate, self.loss, self.curves, self.done, self._lowest = rate, loss, Curves(), 0, math.inf
        self.bare, self._forward = model, model.__dict__.get("forward")
        self.named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self.named:
            raise ValueError("nothing is trained: no parameter takes a gradient")
        self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.sharded = any(hasattr(parameter, "full_tensor") for parameter in self.parameters)
        self._average_file = f"average-{accelerator.process_index if self.sharded else 0}.safetensors"
        self.groups, self.apart = self._grouped(), [list(part) for part in apart] or [self.parameters]
        self.average = Average(self.parameters, config.ema, config.begin) if config.ema else None
        self._resume()
        # After the states are loaded, which replaces the groups.
        self._rates = [
            (group, group.setdefault("highest_lr", group["lr"])) for o in self.optimizers for group in o.param_groups
        ]

    def _grouped(self) -> dict[str, list[int]]:
        """The places in ``named`` of each block's parameters, and of the rest."""
        found: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(self.named):
            match = re.fullmatch(r"(?:.*\.)?(blocks\.\d+)\..*", name)
            found.setdefault(match[1] if match else "rest", []).append(place)
        return found

    def run(
        self, label: str = "train", hooks: Hooks | None = None, stop_at: int | None = None, tick: Tick | None = None
    ) -> Curves:
        """To the last step, or to ``stop_at`` to go on later. With a ``tick`` it is part of a longer work, whose
        progress that shows."""
        hooks, last = hooks or Hooks(), self.config.steps if stop_at is None else stop_at
        own = self.accelerator.is_main_process and tick is None
        with progress(label, self.config.steps, "step", self.done) if own else nullcontext(tick or quiet) as tick:
            for step in range(self.done, last):
                row = self._step(step, hooks)
                self.curves.rows.append(row)
                hooks.show(row)
                ended = step + 1 == self.config.steps
                if hooks.check is not None and (ended or (hooks.check_every and (step + 1) % hooks.check_every == 0)):
                    with self.average.in_place() if self.average is not None else nullcontext():
                        checked = {"step": step, **hooks.check(step)}
                    self.curves.checks.append(checked)
                    hooks.show(checked)
                self.done = step + 1
                if self.done % self.config.save_every == 0 or self.done == last:
                    self._save()
                tick(f"loss {row['loss']:.4g}")
        return self.curves

    def release(self) -> nn.Module:
        """The model as it came, without what accelerate put around it; the loop is at its end."""
        bare: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.sharded:
            gather_(bare)
        # accelerate leaves one bound to the model: a cycle, which keeps all its weights until Python looks for such.
        bare.__dict__.pop("forward", None)
        if self._forward is not None:
            bare.__dict__["forward"] = self._forward
        self.accelerator.free_memory()
        return bare

    def _own_rows(self) -> list[range]:
        """Of the global batch, the rows that this process computes, part by part."""
        parts, processes = self.config.accumulation, self.accelerator.num_processes
        size = self.config.batch // (processes * parts)
        firsts = [(part * processes + self.accelerator.process_index) * size for part in range(parts)]
        return [range(first, first + size) for first in firsts]

    def _step(self, step: int, hooks: Hooks) -> Row:
        accelerator = self.accelerator
        hooks.before(step)
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        share = self.rate(step)
        for group, highest in self._rates:
            group["lr"] = highest * share
        parts: list[dict[str, torch.Tensor]] = []
        for rows in self._own_rows():
            with accelerator.accumulate(self.model):
                losses = self.loss(self.model, step, rows)
                accelerator.backward(losses["loss"])
                parts.append({name: value.detach().float() for name, value in losses.items()})
                if accelerator.sync_gradients:
                    row = {"step": step, **self._reduced(parts), "lr": self._rates[0][0]["lr"], **self._norms()}
                    self._refuse_broken(row)  # first, for clipping by a norm that is NaN makes all gradients NaN
                    cut = [accelerator.clip_grad_norm_(each, self.config.clip or math.inf) for each in self.apart]
                    row.setdefault("grad_norm", math.hypot(*map(float, cut)))
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        return {**row, **hooks.after(step)}

    def _reduced(self, parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means of the losses over parts and processes."""
        names = sorted(parts[0])
        means = torch.stack([torch.stack([part[name] for part in parts]).mean() for name in names])
        values = self.accelerator.reduce(means, "mean").tolist()
        return dict(zip(names, values, strict=True))

    def _norms(self) -> dict[str, Any]:
        """Of the gradients, by group."""
        if self.sharded:  # a shard has none of its own
            return {}
        absent = torch.zeros((), device=self.parameters[0].device)
        squares = [absent if p.grad is None else p.grad.float().square().sum() for p in self.parameters]
        sums = torch.stack([torch.stack([squares[i] for i in places]).sum() for places in self.groups.values()])
        norms = dict(zip(self.groups, sums.sqrt().tolist(), strict=True))
        return {"grad_norm": float(sums.sum().sqrt()), "grad_norms": norms}

    def _refuse_broken(self, row: Row) -> None:
        """Before the weights are touched."""
        step, begin = row["step"], self.config.begin
        for name, what in (("loss", "the loss"), ("grad_norm", "a gradient")):
            if not math.isfinite(row.get(name, 0.0)):
                self._stop(f"{what} is not finite in step {step}, first {self._where_broken(step)}")
        rows = [*self.curves.rows[max(begin, step + 1 - WINDOW) :], row]
        now = statistics.fmean(each["loss"] for each in rows)
        if step + 1 >= begin + 2 * WINDOW and now > self.config.diverged * self._lowest:
            self._stop(
                f"the loss grows without end: {now:.3g} on average up to step {step}, and it was {self._lowest:.3g}; "
                f"{self._where_grown(row)}"
            )
        if len(rows) == WINDOW:
            self._lowest = min(self._lowest, now)

    def _stop(self, message: str) -> None:
        states = states_in(self.folder)
        kept = f"the state after {states[-1][0]} steps is kept in {self.folder}" if states else ""
        hint = "lower the learning rate, clip gradients, or add warm-up steps"
        raise TrainingStopped("; ".join(text for text in (message, kept, hint) if text))

    @torch.no_grad()
    def _where_broken(self, step: int) -> str:
        """The first layer whose output is not finite when the step is computed once more, or the last in the model's
        order whose gradient is not, where the backward pass began to break."""
        for name, parameter in self.named:
            if not parameter.isfinite().all():
                return f"in the weights: {name}"
        broken: list[str] = []

        def watch(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if not broken and isinstance(output, torch.Tensor) and not output.isfinite().all():
                broken.append(name)

        with ExitStack() as hooks:
            for name, child in self.bare.named_modules():
                if not list(child.children()):
                    hooks.enter_context(child.register_forward_hook(partial(watch, name)))
            for rows in self._own_rows():
                self.loss(self.model, step, rows)
                if broken:
                    return f"in the output of {broken[0]}"
        bad = [name for name, p in self.named if p.grad is not None and not p.grad.isfinite().all()]
        return f"in the gradient of {bad[-1]}" if bad else "in the loss itself"

    def _where_grown(self, row: Row) -> str:
        """The group whose gradient first exceeded ten times its median."""
        rows = [earlier for earlier in [*self.curves.rows, row] if "grad_norms" in earlier]
        medians = {name: statistics.median(each["grad_norms"][name] for each in rows) for name in self.groups}
        for each in rows:
            for name, norm in each["grad_norms"].items():
                if norm > 10 * medians[name] > 0:
                    return f"the gradient of {name} was the first to grow, in step {each['step']}"
        return "the gradients of all blocks grew together"

    def _save(self) -> None:
        with new_state(self.accelerator, self.folder, self.done) as folder:
            self.accelerator.save_state(str(folder))
            if self.average is not None and (self.sharded or self.accelerator.is_main_process):
                self.average.save(folder / self._average_file)
            if self.accelerator.is_main_process:
                state = {"recipe": self.recipe, "done": self.done, **vars(self.curves)}
                (folder / LOOP_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _resume(self) -> None:
        found = last_state(self.folder, self.recipe, self.accelerator.is_main_process)
        if found is None:
            return
        folder, state = found
        self.accelerator.load_state(str(folder))
        if self.average is not None:
            self.average.load(folder / self._average_file)
        self.done, self.curves = int(state["done"]), Curves(state["rows"], state["checks"])
        losses = [row["loss"] for row in self.curves.rows[self.config.begin :]]
        windows = (losses[end - WINDOW : end] for end in range(WINDOW, len(losses) + 1))
        self._lowest = min(map(statistics.fmean, windows), default=math.inf)
