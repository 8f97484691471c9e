"""From a calibrated model in BF16 to a trained one: what ``qat`` asks for, on one card or several."""

from __future__ import annotations

import copy
import dataclasses
import statistics
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

from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.sensitivity import final_errors, quantized
from wanquant.qat.blockwise import Blockwise, enter
from wanquant.qat.check import TrainPlan, counted
from wanquant.qat.config import QATConfig, processes
from wanquant.qat.data import Source, Trajectories, make_source, order
from wanquant.qat.loop import Course, Hooks, Loop, Row, make_accelerator
from wanquant.qat.loss import Objective, needs_teacher
from wanquant.qat.plan import TrainingPlan, plan_training, shrinks
from wanquant.qat.schedule import make_rate
from wanquant.qat.scope import choose_, merge_lora_
from wanquant.quant.convert import freeze_into_, make_trainable_, plan_conversion
from wanquant.quant.select import resolve_blocks
from wanquant.quant.trainable import TrainableQuantLinear, trainable_linears
from wanquant.runs.signature import GENERATES, installed, signature
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.device import forget_peak_memory, out_of_memory, peak_memory
from wanquant.wan.experts import Experts, parts_of
from wanquant.wan.products import multiplies_bf16, quick_products
from wanquant.wan.resources.estimate import in_bytes, tokens_of
from wanquant.wan.resources.footprint import mixed_norms

#: Steps between two looks at how far the scales have moved.
DRIFT_EVERY = 10


def settled_precision(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    return "bf16" if multiplies_bf16(device) else "fp32"


def training_libraries() -> dict[str, str | None]:
    """The versions of those that can change what is learned."""
    return {name: installed(name) for name in ("accelerate", "peft")}


@dataclass
class Trainer:
    """``protected`` are the blocks that stay BF16; ``stats`` what calibration saw."""

    calibrator: Calibrator
    plan: TrainPlan
    protected: Sequence[int]
    stats: Mapping[str, Any]
    source: Source | None = None
    #: Bytes that were used at most before the training, whose own peak is told apart.
    peak_before: int = 0
    show: Callable[[Row], None] = lambda row: None

    @property
    def qat(self) -> QATConfig:
        return self.plan.qat

    @property
    def pipeline(self) -> CachedPipeline:
        return self.calibrator.pipeline

    @property
    def precision(self) -> str:
        return settled_precision(self.qat.precision, self.pipeline.device)

    @property
    def measured(self) -> list[str]:
        """The prompts that are measured on."""
        return sorted({text for text, _ in self.plan.pairs})

    @cached_property
    def signature(self) -> str:
        """Of all that can change what is learned."""
        pipeline = self.pipeline
        settings = {
            **self.calibrator.what_is_quantized(self.protected),
            "qat": counted(self.qat),
            "fps": pipeline.model.generation.fps if self.qat.data.source == "folder" else None,
            "left_out": self.measured if self.qat.data.source == "scenes" else [],
            "libraries": training_libraries(),
            "precision": self.precision,
            "world": processes(),
            "model": {"generation": dataclasses.asdict(pipeline.model.generation)},  # where the volatile is left out
            "outliers": dataclasses.asdict(pipeline.model.outliers),
            "batch": pipeline.model.batch,
        }
        return signature(settings, pipeline.fingerprint, pipeline.device, (*GENERATES, "qat"))

    @property
    def states(self) -> Path:
        return self.pipeline.cache.root / "training" / self.signature

    def prepare(self) -> None:
        """Makes the data, or finds them in the cache; the model has to be in BF16."""
        self.source = make_source(self.pipeline, self.qat.data, self.plan.learned, self.qat.seed, self.measured)

    def train(self) -> dict[str, Any]:
        """Leaves the trained transformer in the pipeline; returns its curves, and the memory it took."""
        qat, device = self.qat, self.pipeline.device
        accelerator = make_accelerator(device, self.precision, qat.accumulation)
        planned = self.planned  # of the model as it is now
        self.peak_before = peak_memory(device)
        forget_peak_memory(device)
        begun = peak_memory(device)
        try:
            told = self._train(accelerator)
        except Exception as error:
            if out_of_memory(error):
                error.add_note(f"the plan was {in_bytes(planned.total)}; to shrink it: {shrinks(self.plan.config)}")
            raise
        memory = {"begun": begun, "peak": peak_memory(device), "planned": planned.added(device.type == "cpu")}
        return {**told, "memory": memory}

    @cached_property
    def planned(self) -> TrainingPlan:
        pipeline = self.pipeline
        samples = len(self.source) if self.source is not None else 0
        tokens = tokens_of(pipeline.model.generation, pipeline.transformer)
        return plan_training(pipeline.transformer, self.plan.config, tokens, samples, self.precision, processes())

    def _train(self, accelerator: Accelerator) -> dict[str, Any]:
        qat = self.qat
        with quick_products(self.pipeline.device), mixed_norms():
            if qat.scope == "blockwise":
                return {"blocks": self._blockwise(accelerator)}
            original = self.pipeline.transformer
            student = copy.deepcopy(original)
            told = self._whole(accelerator, student, original)
            merge_lora_(student)
            freeze_into_(original, student)
        return told

    def _optimizers(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        qat = self.qat
        first, second = qat.betas
        return [torch.optim.AdamW(parameters, qat.lr, (first, second), weight_decay=qat.weight_decay)]

    def _course(self) -> Course:
        qat = self.qat
        return Course(
            steps=qat.steps,
            batch=qat.batch,
            accumulation=qat.accumulation,
            clip=qat.clip,
            ema=qat.ema,
            begin=qat.bf16_steps,
            diverged=qat.diverged,
            save_every=qat.save_every,
            seed=qat.seed,
        )

    def _rate(self) -> Any:
        qat = self.qat
        return make_rate(qat.schedule, qat.steps, qat.warmup, qat.floor, qat.bf16_steps)

    def _blockwise(self, accelerator: Accelerator) -> list[Row]:
        pipeline, qat, source = self.pipeline, self.qat, self.source
        transformer = pipeline.transformer
        assert isinstance(source, Trajectories)
        plan = plan_conversion(transformer, self.calibrator.scheme.config, self.protected, self.calibrator.modules)
        touched = {row.block for row in plan.modules if row.status == "converted"}

        def make(index: int, block: nn.Module) -> nn.Module | None:
            return self._alone(block, index) if index in touched else None

        asked = resolve_blocks(qat.blocks, plan.blocks) if qat.blocks else range(plan.blocks)
        chosen = [index for index in asked if index in touched]
        if not chosen:
            raise ValueError("qat.scope=blockwise: of qat.blocks none is quantized, so nothing would be trained")
        places = sorted(order(len(source), qat.seed, 0, min(qat.samples or len(source), len(source))))
        how = (self._optimizers, self._rate(), self._course(), self.states, self.signature, self.show)
        rows, first = list[Row](), 0
        parts, shares = parts_of(transformer), shared_out(transformer, source, places)
        for number, share in enumerate(shares):
            if len({source.video_of(place) for place in share}) < 2:
                which = "" if len(parts) == 1 else f" of transformer {number + 1} of {len(parts)}"
                raise ValueError(f"qat.scope=blockwise: fewer than two videos ask anything{which}")
        del transformer  # two as one would keep the blocks that are replaced
        for part, asked_of_it in zip(parts, shares, strict=True):
            past = first + len(part.get_submodule("blocks"))  # type: ignore[arg-type]
            stream = enter(part, source, asked_of_it, pipeline.device)
            stream.at_once = stream.at_once if self.calibrator.scheme.independent else 1
            stream.trained_in = torch.float32 if self.precision == "fp32" else torch.bfloat16
            own = [index for index in chosen if first <= index < past]
            rows += Blockwise(accelerator, part, stream, make, own, *how, first).run()
            first = past
        return rows

    def _alone(self, block: nn.Module, index: int) -> nn.Module:
        """A copy of the block in float32, trainable, outside of its model."""
        holder = nn.Module()
        holder.blocks = nn.ModuleList([copy.deepcopy(block)])
        own = {
            name.replace(f"blocks.{index}.", "blocks.0.", 1): seen
            for name, seen in self.stats.items()
            if name.startswith(f"blocks.{index}.")
        }
        make_trainable_(holder, self.calibrator.scheme.config, (), self.calibrator.modules, own, self.plan.training)
        found: nn.Module = holder.blocks[0]
        for parameter in found.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return found

    def _whole(self, accelerator: Accelerator, student: nn.Module, original: nn.Module) -> dict[str, Any]:
        """All at once, as far as the scope says."""
        qat, assigned = self.qat, self.source
        assert assigned is not None
        if qat.quantize:
            how = (
                self.calibrator.scheme.config,
                self.protected,
                self.calibrator.modules,
                self.stats,
                self.plan.training,
            )
            make_trainable_(student, *how)
        if self.precision == "fp32":
            student.float()
        trained = choose_(student, qat.scope, qat.blocks, qat.lora.rank, qat.lora.alpha, qat.seed)
        if qat.recompute:
            model: Any = student
            model.enable_gradient_checkpointing()
        teacher = original if needs_teacher(qat.loss, qat.data.source) else None
        objective = Objective(qat.loss, assigned, qat.batch, self.pipeline.device, teacher)
        linears = trainable_linears(student)
        # Before a state is taken up, whose weights have moved already.
        adapted = qat.scope == "lora"  # whose weights stay, so that nothing could be said of their scales
        first = {name: _size(layer) for name, layer in linears.items()}

        def loss(model: nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
            """Counts what falls beyond the range in this forward pass, and not when it is taken again."""
            for layer in linears.values():
                layer.counting = True
            found = objective(model, step, rows)
            for layer in linears.values():
                layer.counting = False
            return found

        loop = Loop(
            accelerator,
            student,
            self._optimizers(trained),
            self._rate(),
            loss,
            self._course(),
            self.states,
            self.signature,
        )
        if loop.done and accelerator.is_main_process:
            print(f"training goes on at step {loop.done} of {qat.steps}", file=sys.stderr, flush=True)
        check = self._validation(accelerator, student, original) if qat.check_every else None
        hooks = Hooks(
            check=check,
            check_every=qat.check_every,
            before=lambda step: self._begin(linears, step),
            after=lambda step: self._end(accelerator, linears, {} if adapted else first, step),
            show=self.show,
        )
        curves = loop.run("train", hooks)
        if loop.average is not None:
            loop.average.settle()
        loop.release()
        return vars(curves)

    def _validation(self, accelerator: Accelerator, student: nn.Module, original: nn.Module) -> Callable[[int], Row]:
        """SQNR of the final latents of the calibration prompts, which are neither learned nor measured: the model's as
        it is, and the untrained baseline's."""
        pipeline, calibrator = self.pipeline, self.calibrator
        references = calibrator.references
        how = (calibrator.scheme.config, self.protected, calibrator.modules, self.stats)

        def measure(label: str) -> float:
            with pipeline.progress(label, calibrator.pairs) as tick:
                errors = final_errors(pipeline.generate, calibrator.pairs, references, tick)
            return statistics.fmean(item.value for item in errors)

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
                return {"latent_sqnr": measure("validate"), "untrained": untrained}
            finally:
                pipeline.transformer = original

        return check

    def _begin(self, linears: dict[str, TrainableQuantLinear], step: int) -> None:
        for layer in linears.values():
            layer.quantizing = step >= self.qat.bf16_steps

    def _end(
        self,
        accelerator: Accelerator,
        linears: dict[str, TrainableQuantLinear],
        first: dict[str, torch.Tensor],
        step: int,
    ) -> Row:
        """Counts what fell beyond the range, moves delayed scales on, looks how far scales have moved."""
        if not linears:
            return {}
        row: Row = {}
        own = torch.stack([layer.clipped for layer in linears.values()])
        weights = torch.stack([layer.clipped_weights for layer in linears.values()]).tolist()
        counts = [a + b for a, b in zip(accelerator.reduce(own, "sum").tolist(), weights, strict=True)]
        new = {name: count for name, count in zip(linears, counts, strict=True) if count}
        for layer in linears.values():
            layer.clipped = torch.zeros_like(layer.clipped)
        row |= {"clipped": sum(new.values()), "clipped_by": new}
        if self.qat.scaling == "delayed":
            seen = torch.stack([layer.seen for layer in linears.values()])
            largest = accelerator.gather(seen[None]).amax(0) if accelerator.num_processes > 1 else seen
            for layer, value in zip(linears.values(), largest, strict=True):
                layer.advance(value)
        if first and (step % DRIFT_EVERY == 0 or step + 1 == self.qat.steps):
            moved: dict[str, list[float]] = {}
            for name, layer in linears.items():
                block = ".".join(name.split(".")[:2])
                moved.setdefault(block, []).append(float((_size(layer) / first[name]).log2()))
            row["drift"] = {block: sum(values) / len(values) for block, values in moved.items()}
        return row


def shared_out(transformer: nn.Module, source: Trajectories, places: Sequence[int]) -> list[list[int]]:
    """The samples that each part of it is given."""
    if not isinstance(transformer, Experts):
        return [list(places)]
    parts = transformer.part_of(torch.tensor([source.recording.timestep(place) for place in places]))
    return [
        [p for p, of in zip(places, parts, strict=True) if of == number] for number in range(len(transformer.parts))
    ]


@torch.no_grad()
def _size(layer: TrainableQuantLinear) -> torch.Tensor:
    """What a weight's scale follows: the largest magnitude of it, and of a static input its step."""
    gain = 0.0 if layer.weight_gain is None else layer.weight_gain.mean()
    size = layer.weight.detach().abs().amax().float() * torch.as_tensor(gain).exp()
    return size if layer.input_scale is None else size * layer.input_scale
