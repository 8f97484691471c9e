"""From a calibrated model in BF16 to a trained one, as ``qat`` in the config says, on one card or several."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from wanquant.evaluate.single_steps import measured_now
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.sensitivity import quantized
from wanquant.qat.blockwise import Blockwise, record_block_inputs, split_samples, trainable_block
from wanquant.qat.config import QATConfig, loop_config, make_rate
from wanquant.qat.data import Source, Trajectories, make_source, shuffled_order
from wanquant.qat.estimate import estimate_memory, shrinks
from wanquant.qat.loop import Hooks, Loop, Loss, Row, make_accelerator
from wanquant.qat.loss import Objective, needs_teacher
from wanquant.qat.plan import TrainPlan
from wanquant.qat.scope import choose_, merge_lora_
from wanquant.quant.conversion import plan_conversion
from wanquant.quant.convert import freeze_into_, make_trainable_
from wanquant.quant.trainable import TrainableQuantLinear, trainable_linears
from wanquant.runs.progress import progress
from wanquant.runs.reports.columns import STEP_SQNR
from wanquant.runs.signature import GENERATES, signature
from wanquant.wan.device import forget_peak_memory, out_of_memory, peak_memory
from wanquant.wan.experts import parts_of
from wanquant.wan.products import quick_products
from wanquant.wan.resources.footprint import mixed_norms
from wanquant.wan.resources.placement import placement_of
from wanquant.wan.resources.printed import in_bytes

#: Steps between two looks at how far the scales have moved.
DRIFT_EVERY = 10


@dataclass
class Trainer:
    """``protected`` are the blocks that stay BF16; ``stats`` the calibration statistics of each linear's input."""

    calibrator: Calibrator
    plan: TrainPlan
    protected: Sequence[int]
    stats: Mapping[str, Any]
    source: Source | None = None
    #: Bytes that were used at most before the training, whose own peak is measured by itself.
    peak_before: int = 0
    show: Callable[[Row], None] = lambda row: None

    def __post_init__(self) -> None:
        self.qat, self.pipeline, self.modules = self.plan.qat, self.calibrator.pipeline, self.calibrator.modules

    @property
    def measured(self) -> list[str]:
        """The prompts that are measured on."""
        return sorted({text for text, _ in self.plan.pairs})

    @cached_property
    def signature(self) -> str:
        """Of all that can change what is learned."""
        model = self.pipeline.model
        settings = {
            **self.calibrator.what_is_quantized(self.protected),
            **self.plan.counted_training(),
            "fps": model.generation.fps if self.qat.data.source == "folder" else None,
            "left_out": self.measured if self.qat.data.source == "scenes" else [],
            "precision": self.plan.precision,
            "model": {"generation": dataclasses.asdict(model.generation)},  # where the volatile is left out
            "outliers": dataclasses.asdict(model.outliers),
            "batch": model.batch,
            "single_steps": self.calibrator.single_steps if self.qat.check_every else None,  # of the validation
        }
        return signature(settings, self.pipeline.fingerprint, self.pipeline.device, (*GENERATES, "qat"))

    @property
    def states(self) -> Path:
        return self.pipeline.cache.root / "training" / self.signature

    def prepare(self) -> None:
        """Makes the data, or finds them in the cache; the model has to be in BF16."""
        self.source = make_source(self.pipeline, self.qat.data, self.plan.learned, self.qat.seed, self.measured)

    def train(self) -> dict[str, Any]:
        """Leaves the trained transformer in the pipeline; returns its curves, and the memory it took."""
        device = self.pipeline.device
        waits = placement_of(self.pipeline.transformer).streams and device.type != "cpu"
        planned = estimate_memory(self.plan, waits)
        accelerator = make_accelerator(device, self.plan.precision, self.qat.accumulation)
        self.peak_before = peak_memory(device)
        forget_peak_memory(device)
        begun = peak_memory(device)
        try:
            with quick_products(device), mixed_norms():
                found = self._train(accelerator)
        except Exception as error:
            if out_of_memory(error):
                error.add_note(f"the plan was {in_bytes(planned.total)}; to shrink it: {shrinks(self.qat)}")
            raise
        memory = {"begun": begun, "peak": peak_memory(device), "planned": planned.added(device.type == "cpu")}
        return {**found, "memory": memory}

    def _train(self, accelerator: Accelerator) -> dict[str, Any]:
        if self.qat.scope == "blockwise":
            return {"blocks": self._blockwise(accelerator)}
        original = self.pipeline.transformer
        student = copy.deepcopy(original)
        curves = self._whole(accelerator, student, original)
        # Now that gradients and the optimizer's state are gone.
        merge_lora_(student)
        freeze_into_(original, student)
        return curves

    def _loop(self, accelerator: Accelerator, model: nn.Module, loss: Loss, folder: Path, name: str = "") -> Loop:
        qat = self.qat
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first, second = qat.betas
        optimizer = torch.optim.AdamW(parameters, qat.lr, (first, second), weight_decay=qat.weight_decay)
        rate = make_rate(qat.schedule, qat.steps, qat.warmup, qat.floor, qat.bf16_steps)
        return Loop(accelerator, model, [optimizer], rate, loss, loop_config(qat), folder, self.signature + name)

    def _blockwise(self, accelerator: Accelerator) -> list[Row]:
        """Block after block, of Wan2.2 through one transformer and then through the other."""
        qat, source, scheme, transformer = self.qat, self.source, self.plan.scheme, self.pipeline.transformer
        assert isinstance(source, Trajectories)
        conversion = plan_conversion(transformer, scheme, self.protected, self.modules)
        touched = {row.block for row in conversion.modules if row.status == "converted"}
        chosen = [index for index in self.plan.chosen if index in touched]
        if not chosen:
            raise ValueError("qat.scope=blockwise: of qat.blocks none is quantized, so nothing would be trained")

        def make(index: int, block: nn.Module) -> nn.Module | None:
            how = (scheme, self.modules, self.stats, self.plan.training)
            return trainable_block(block, index, *how) if index in touched else None

        def new_loop(block: nn.Module, loss: Loss, folder: Path, index: int) -> Loop:
            return self._loop(accelerator, block, loss, folder, f" block {index}")

        places = sorted(shuffled_order(len(source), qat.seed, 0, min(qat.samples or len(source), len(source))))
        parts, shares = parts_of(transformer), split_samples(transformer, source, places)
        del transformer  # two as one would keep the blocks that are replaced
        how, rows, first = (new_loop, loop_config(qat), self.states, self.show), list[Row](), 0
        for part, share in zip(parts, shares, strict=True):
            count = len(part.get_submodule("blocks"))  # type: ignore[arg-type]
            inputs = record_block_inputs(part, source, share, self.pipeline.device)
            inputs.at_once = inputs.at_once if scheme.independent else 1
            inputs.trained_in = torch.float32 if self.plan.precision == "fp32" else torch.bfloat16
            own = [index for index in chosen if first <= index < first + count]
            rows += Blockwise(accelerator, part, inputs, make, own, *how, first).run()
            first += count
        return rows

    def _whole(self, accelerator: Accelerator, student: Any, original: nn.Module) -> dict[str, Any]:
        """All blocks at once, as far as the scope says."""
        qat, plan, source = self.qat, self.plan, self.source
        assert source is not None
        if qat.quantize:
            make_trainable_(student, plan.scheme, self.protected, self.modules, self.stats, plan.training)
        if plan.precision == "fp32":
            student.float()
        choose_(student, qat.scope, plan.chosen, qat.lora.rank, qat.lora.alpha, qat.seed)
        if qat.recompute:
            student.enable_gradient_checkpointing()
        teacher = original if needs_teacher(qat.loss, qat.data.source) else None
        objective = Objective(qat.loss, source, qat.batch, self.pipeline.device, teacher)
        linears = WatchedLinears(student, qat, accelerator)  # before a state is taken up, whose weights have moved
        loop = self._loop(accelerator, student, linears.counting(objective), self.states)
        if loop.done and accelerator.is_main_process:
            print(f"training goes on at step {loop.done} of {qat.steps}", file=sys.stderr, flush=True)
        check = self._validation(accelerator, student, original) if qat.check_every else None
        curves = loop.run("train", Hooks(linears.before, linears.after, check, qat.check_every, self.show))
        if loop.average is not None:
            loop.average.settle()
        loop.release()
        return vars(curves)

    def _validation(self, accelerator: Accelerator, student: nn.Module, original: nn.Module) -> Callable[[int], Row]:
        """SQNR of single steps of the calibration prompts, which are neither learned nor measured: the model's as it
        is, and the untrained baseline's."""
        pipeline, trajectories = self.pipeline, self.calibrator.trajectories

        def measure(label: str) -> float:
            with progress(label, trajectories.recording.passes) as tick:
                return float(measured_now(trajectories, tick).decibels.mean())

        how = (self.plan.scheme, self.protected, self.modules, self.stats)
        with quantized(original, *how) if self.qat.quantize else nullcontext():
            untrained = measure("validate untrained")

        def check(step: int) -> Row:
            if not accelerator.is_main_process:
                return {}
            now, target = copy.deepcopy(student), copy.deepcopy(original)
            merge_lora_(now)
            freeze_into_(target, now)
            pipeline.transformer = target
            try:
                return {STEP_SQNR: measure("validate"), "untrained": untrained}
            finally:
                pipeline.transformer = original

        return check


class WatchedLinears:
    """The quantized linears of a model in training, beside each step: when they begin to round, how many elements fell
    beyond the range, how far the scales have moved."""

    def __init__(self, model: nn.Module, qat: QATConfig, accelerator: Accelerator) -> None:
        self.layers, self.qat, self.accelerator = trainable_linears(model), qat, accelerator
        # The weights of lora stay, so that nothing could be said of their scales.
        self.first = {} if qat.scope == "lora" else {name: _size(layer) for name, layer in self.layers.items()}

    def counting(self, loss: Loss) -> Loss:
        """The same loss, which counts what falls beyond the range in its forward pass, and not when that is taken
        again for the backward pass."""

        def counted(model: nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
            for layer in self.layers.values():
                layer.counting = True
            found = loss(model, step, rows)
            for layer in self.layers.values():
                layer.counting = False
            return found

        return counted

    def before(self, step: int) -> None:
        for layer in self.layers.values():
            layer.quantizing = step >= self.qat.bf16_steps

    def after(self, step: int) -> Row:
        """Counts, moves delayed scales on, and gives each block's drift: the mean over its linears of log2 of their
        size over the first."""
        if not self.layers:
            return {}
        layers = list(self.layers.values())
        inputs = self.accelerator.reduce(torch.stack([layer.clipped for layer in layers]), "sum").tolist()
        weights = torch.stack([layer.clipped_weights for layer in layers]).tolist()
        counts = {name: a + b for name, a, b in zip(self.layers, inputs, weights, strict=True) if a + b}
        for layer in layers:
            layer.clipped = torch.zeros_like(layer.clipped)
        row: Row = {"clipped": sum(counts.values()), "clipped_by": counts}
        if self.qat.scaling == "delayed":
            seen = torch.stack([layer.seen.to(layer.history.device) for layer in layers])
            largest = self.accelerator.gather(seen[None]).amax(0) if self.accelerator.num_processes > 1 else seen
            for layer, value in zip(layers, largest, strict=True):
                layer.advance(value)
        if self.first and (step % DRIFT_EVERY == 0 or step + 1 == self.qat.steps):
            moved: dict[str, list[float]] = {}
            for name, layer in self.layers.items():
                block = ".".join(name.split(".")[:2])
                moved.setdefault(block, []).append(float((_size(layer) / self.first[name]).log2()))
            row["drift"] = {block: sum(values) / len(values) for block, values in moved.items()}
        return row


@torch.no_grad()
def _size(layer: TrainableQuantLinear) -> torch.Tensor:
    """What a weight's scale follows: its largest magnitude; of a static input times that one's scale."""
    gain = 0.0 if layer.weight_gain is None else layer.weight_gain.mean()
    size = layer.weight.detach().abs().amax().float() * torch.as_tensor(gain).exp()
    return size if layer.input_scale is None else size * layer.input_scale
