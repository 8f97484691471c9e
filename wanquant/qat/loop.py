"""The training loop: whatever is trained here is trained by it, the tiny-wan that ships as well.

A step is a function of its number and of the weights before it: whoever computes the loss draws the data of (seed,
step), and torch's generators are seeded from them anew. So there is no position in the data and no state of a generator
to lose, and a run that was killed goes on with what an uninterrupted one would have seen.

A global batch is ``course.batch`` rows; each process takes its share of them, in ``course.accumulation`` parts, and
gradients are means over all. accelerate places, casts, accumulates, clips and reduces; under ``accelerate launch``
several processes compute what one would, but for the order of sums.

States are folders ``state-<steps done>``, written under another name and renamed when whole. What is not finite, or
grows without end, stops the run before it reaches the weights, and is traced to the layer where it began.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from wanquant.qat.schedule import Average, Rate
from wanquant.runs.progress import Tick, progress

#: Losses that are compared to say that they grow: the last so many, and the lowest mean of so many before.
WINDOW = 10
Row = dict[str, Any]


class TrainingStopped(ValueError):
    """A loss that is not finite, or that grows without end; the message says where it began."""


@dataclass(frozen=True)
class Course:
    """How long, how much at a time, and when to give up.

    batch         rows of a step, over all processes and parts
    accumulation  parts a process takes its share of them in
    clip          the norm gradients are cut to; 0 leaves them
    ema           decay of the moving average of the weights; 0 for none
    begin         the step from which on weights are averaged and losses compared: what comes before is a warm-up
    diverged      how many times its lowest value the loss may reach
    save_every    steps between two states
    """

    steps: int
    batch: int
    accumulation: int = 1
    clip: float = 1.0
    ema: float = 0.0
    begin: int = 0
    diverged: float = 10.0
    save_every: int = 50
    seed: int = 0


@dataclass
class Hooks:
    """What happens beside a step. ``before`` it; ``after`` it, which may add to its row; ``check``, after every
    ``check_every`` steps and the last, gives a row of its own; ``show`` is told both."""

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
    return Accelerator(
        kwargs_handlers=[patience],
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=accumulation,
    )


def quiet(note: str = "") -> None:
    """The tick of a process that shows no progress."""


class Loop:
    """Prepares ``model`` and ``optimizers``, whose learning rates are the highest they will have, and takes up the
    last state in ``folder``, if there is one.

    recipe   what the training is a function of: a state of another one is refused
    groups   pattern of a parameter's name, whose first group names those whose gradient norm is told apart
    apart    parameters whose gradients are clipped apart from the others'; all together unless given
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rate: Rate,
        loss: Loss,
        course: Course,
        folder: Path,
        recipe: str,
        groups: str = r"(?:.*\.)?(blocks\.\d+)\..*",
        apart: Sequence[Sequence[nn.Parameter]] = (),
    ) -> None:
        shares = accelerator.num_processes * course.accumulation
        if course.batch % shares:
            raise ValueError(
                f"a batch of {course.batch} does not divide into {shares} ({accelerator.num_processes} processes "
                f"times {course.accumulation} parts)"
            )
        self.accelerator, self.course, self.folder, self.recipe = accelerator, course, folder, recipe
        self.rate, self.loss, self.curves, self.done, self._lowest = rate, loss, Curves(), 0, math.inf
        self.bare, self._forward = model, model.__dict__.get("forward")
        self.named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self.named:
            raise ValueError("nothing is trained: no parameter takes a gradient")
        self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.groups, self.apart = self._grouped(groups), [list(part) for part in apart] or [self.parameters]
        self.average = Average(self.parameters, course.ema, course.begin) if course.ema else None
        self._resume()
        # After the states are loaded, which replaces the groups.
        self._rates = [
            (group, group.setdefault("highest_lr", group["lr"])) for o in self.optimizers for group in o.param_groups
        ]

    def _grouped(self, pattern: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(self.named):
            match = re.fullmatch(pattern, name)
            found.setdefault(match[1] if match else "rest", []).append(place)
        return found

    def run(
        self, label: str = "train", hooks: Hooks | None = None, stop_at: int | None = None, tick: Tick | None = None
    ) -> Curves:
        """To the last step, or to ``stop_at`` to go on later. With a ``tick`` it is part of a longer work, whose
        progress that shows."""
        hooks, last = hooks or Hooks(), self.course.steps if stop_at is None else stop_at
        main = self.accelerator.is_main_process
        own = main and tick is None
        with progress(label, self.course.steps, "step", self.done) if own else nullcontext(tick or quiet) as tick:
            for step in range(self.done, last):
                row = self._step(step, hooks)
                self.curves.rows.append(row)
                hooks.show(row)
                ended = step + 1 == self.course.steps
                if hooks.check is not None and (ended or (hooks.check_every and (step + 1) % hooks.check_every == 0)):
                    with self.with_average():
                        checked = {"step": step, **hooks.check(step)}
                    self.curves.checks.append(checked)
                    hooks.show(checked)
                self.done = step + 1
                if self.done % self.course.save_every == 0 or self.done == last:
                    self._save()
                tick(f"loss {row['loss']:.4g}")
        return self.curves

    @contextmanager
    def with_average(self) -> Iterator[None]:
        """The model with the averaged weights, where there are any."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            yield

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

    def _step(self, step: int, hooks: Hooks) -> Row:
        course, accelerator = self.course, self.accelerator
        hooks.before(step)
        torch.manual_seed((course.seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        share = self.rate(step)
        for group, highest in self._rates:
            group["lr"] = highest * share
        size = course.batch // (accelerator.num_processes * course.accumulation)
        parts: list[dict[str, torch.Tensor]] = []
        for part in range(course.accumulation):
            first = (part * accelerator.num_processes + accelerator.process_index) * size
            with accelerator.accumulate(self.model):
                losses = self.loss(self.model, step, range(first, first + size))
                accelerator.backward(losses["loss"])
                parts.append({name: value.detach().float() for name, value in losses.items()})
                if accelerator.sync_gradients:
                    told = self._reduced(parts)
                    row = {"step": step, **told, "lr": self._rates[0][0]["lr"], **self._norms()}
                    self._refuse_broken(row)  # first, for clipping by a norm that is NaN makes all gradients NaN
                    cut = [accelerator.clip_grad_norm_(part, course.clip or math.inf) for part in self.apart]
                    row.setdefault("grad_norm", math.hypot(*map(float, cut)))
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        return {**row, **hooks.after(step)}

    def _reduced(self, parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
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
        if not math.isfinite(row["loss"]) or not math.isfinite(row.get("grad_norm", 0.0)):
            what = "the loss" if not math.isfinite(row["loss"]) else "a gradient"
            self._stop(f"{what} is not finite in step {row['step']}, first {self._where_broken(row['step'])}")
        rows = [*self.curves.rows[max(self.course.begin, row["step"] + 1 - WINDOW) :], row]
        now = statistics.fmean(each["loss"] for each in rows)
        if row["step"] + 1 >= self.course.begin + 2 * WINDOW and now > self.course.diverged * self._lowest:
            self._stop(
                f"the loss grows without end: {now:.3g} on average up to step {row['step']}, and it was "
                f"{self._lowest:.3g}; {self._where_grown(row)}"
            )
        if len(rows) == WINDOW:
            self._lowest = min(self._lowest, now)

    def _stop(self, message: str) -> None:
        states = states_in(self.folder)
        kept = f"the state after {states[-1][0]} steps is kept in {self.folder}" if states else ""
        hint = "lower the learning rate, clip gradients, or add warm-up steps"
        raise TrainingStopped("; ".join(text for text in (message, kept, hint) if text))

    def _where_broken(self, step: int) -> str:
        """The first layer whose output is not finite when the step is computed once more, or the last in the model's
        order whose gradient is not, where the backward pass began to break."""
        broken: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not broken and isinstance(output, torch.Tensor) and not output.isfinite().all():
                    broken.append(name)

            return hook

        leaves = [(name, child) for name, child in self.bare.named_modules() if not list(child.children())]
        handles = [child.register_forward_hook(watch(name)) for name, child in leaves]
        try:
            with torch.no_grad():
                for parameter_name, parameter in self.named:
                    if not parameter.isfinite().all():
                        return f"in the weights: {parameter_name}"
                size = self.course.batch // (self.accelerator.num_processes * self.course.accumulation)
                for part in range(self.course.accumulation):
                    first = (part * self.accelerator.num_processes + self.accelerator.process_index) * size
                    self.loss(self.model, step, range(first, first + size))
                    if broken:
                        return f"in the output of {broken[0]}"
        finally:
            for handle in handles:
                handle.remove()
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

    @property
    def sharded(self) -> bool:
        return any(hasattr(parameter, "full_tensor") for parameter in self.parameters)

    @property
    def _average_file(self) -> str:
        return f"average-{self.accelerator.process_index if self.sharded else 0}.safetensors"

    def _save(self) -> None:
        final = self.folder / f"state-{self.done:06d}"
        partial = final.with_name(f"{final.name}.partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        if self.average is not None and (self.sharded or self.accelerator.is_main_process):
            self.average.save(partial / self._average_file)
        self.accelerator.wait_for_everyone()  # each process writes its own part
        if self.accelerator.is_main_process:
            told = {"recipe": self.recipe, "done": self.done, **vars(self.curves)}
            (partial / "loop.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for done, path in states_in(self.folder):
                if done != self.done:
                    shutil.rmtree(path, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        for partial in self.folder.glob("state-*.partial") if self.accelerator.is_main_process else ():
            shutil.rmtree(partial, ignore_errors=True)
        states = states_in(self.folder)
        if not states:
            return
        _, folder = states[-1]
        told = json.loads((folder / "loop.json").read_text(encoding="utf-8"))
        if told["recipe"] != self.recipe:
            raise ValueError(f"{folder} was made by another recipe: {told['recipe']}, not {self.recipe}")
        self.accelerator.load_state(str(folder))
        if self.average is not None:
            self.average.load(folder / self._average_file)
        self.done, self.curves = int(told["done"]), Curves(told["rows"], told["checks"])
        losses = [row["loss"] for row in self.curves.rows[self.course.begin :]]
        windows = (losses[end - WINDOW : end] for end in range(WINDOW, len(losses) + 1))
        self._lowest = min(map(statistics.fmean, windows), default=math.inf)


def gather_(module: nn.Module) -> None:
    """Makes whole tensors of shards."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            whole: Any = getattr(parameter, "full_tensor", None)
            if parameter is not None and whole is not None:
                child._parameters[name] = nn.Parameter(whole().detach(), parameter.requires_grad)


def states_in(folder: Path) -> list[tuple[int, Path]]:
    """Steps done and place of the whole states in a loop's folder, the last one last."""
    found = (re.fullmatch(r"state-(\d+)", path.name) for path in folder.glob("state-*"))
    return sorted((int(match[1]), folder / match[0]) for match in found if match)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights in the last state of a loop's folder; of tied ones there is one. ``ValueError`` if there is
    no state."""
    states = states_in(folder)
    if not states:
        raise ValueError(f"{folder} holds no state of a training")
    return load_file(states[-1][1] / "model.safetensors")
