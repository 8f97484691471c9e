"""The training job: does quantization-aware training beat plain quantization here?

Data flows as in ``wanquant.ptq.job``, with the training between: load, calibrate, generate in BF16, generate with the
*untrained baseline*, which is what PTQ makes of the same model with the same protection, scales and seeds; train from
there; generate again from the same noise, compare all three, save, report.

    over_untrained.step_sqnr     trained less untrained, pair by pair, of single steps along BF16's own trajectories:
                                 the verdict is whether its interval holds 0
    over_untrained.latent_sqnr   the same of the final latents

Without quantization (``qat=off``) the same loop fine-tunes the BF16 model, and the baseline is the model as it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list

from wanquant.evaluate import gates
from wanquant.evaluate.compare import Networks, of_pair
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.single_steps import SingleSteps, Trajectories, measure_steps, record
from wanquant.evaluate.stats import ENOUGH_PAIRS, Estimate, Item, compared, detectable, difference
from wanquant.ptq.calibrator import Calibration
from wanquant.ptq.estimate import estimate_resources
from wanquant.ptq.generating import bf16_videos, compare_videos, quantized_videos
from wanquant.ptq.job import Job
from wanquant.ptq.plan import with_weights
from wanquant.ptq.protect import Choice, choose
from wanquant.ptq.result import conversion, overflow, overflowed_weights, verdict, write_videos
from wanquant.ptq.running import run_job
from wanquant.ptq.sensitivity import quantized
from wanquant.qat.estimate import count_training_videos, estimate_seconds, print_estimates, training_ways
from wanquant.qat.loop import make_accelerator
from wanquant.qat.plan import TrainPlan, resolve_train
from wanquant.qat.train import Trainer
from wanquant.qat.train_config import TrainConfig
from wanquant.quant import ConversionReport, plan_conversion
from wanquant.runs.files import whole_folder
from wanquant.runs.launch import processes
from wanquant.runs.progress import progress
from wanquant.runs.reports.columns import DRIFT, STEP_SQNR
from wanquant.runs.signature import MEASURES, signature
from wanquant.runs.tracking import live
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.checkpoint import quantization_of, quantized_linears, save_quantized, save_transformer
from wanquant.wan.checkpoints.sums import seal
from wanquant.wan.device import pick_device
from wanquant.wan.experts import transformers_in
from wanquant.wan.generate import Sample
from wanquant.wan.load import hush_libraries, read_transformer
from wanquant.wan.resources.choice import choose as choose_offload
from wanquant.wan.resources.estimate import ResourceEstimate
from wanquant.wan.resources.placement import placement_of

#: Measured against the untrained baseline, pair by pair. The first decides.
COMPARED = (STEP_SQNR, DRIFT, "psnr", "ssim", "lpips", "attributes")
UNTRAINED = "untrained."
CURVES = "training.json"
Floors = dict[str, list[tuple[Sample, Sample]]]


@dataclass(frozen=True)
class Generated:
    """Videos of the measured pairs; single denoising steps, by the name of their metric, of a model that is or was
    quantized; what quantized linears counted."""

    samples: list[Sample]
    single_steps: dict[str, SingleSteps] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def run_train(config: TrainConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """As ``run_ptq``. Under ``accelerate launch`` the first process does all of it, and the others train with it."""
    if processes() == 1 or config.dry_run:
        return run_job(config, folder, config_yaml, TrainJob)
    TrainJob.called = False
    accelerator = make_accelerator(pick_device(config.model.device))
    if not accelerator.is_main_process:
        assist(config)
        return None
    try:
        return run_job(config, folder, config_yaml, TrainJob)
    finally:
        if not TrainJob.called:  # there was nothing to train, or it failed before
            broadcast_object_list([None])


def assist(config: TrainConfig) -> None:
    """Waits until the first process has all that can be made once, and trains with it; that one alone judges."""
    word: list[Any] = [None]
    broadcast_object_list(word)
    if word[0] is None:
        return
    plan = resolve_train(dataclasses.replace(config, eval=EvalConfig(single_steps=config.eval.single_steps)))
    torch.set_num_threads(plan.config.threads)
    hush_libraries()
    calibrator = TrainJob(with_weights(plan)).load()
    trainer = Trainer(calibrator, plan, word[0], calibrator.inputs())
    trainer.prepare()
    trainer.train()


class TrainJob(Job):
    name: ClassVar[str] = "train"
    #: Whether the other processes train too.
    called: ClassVar[bool] = False

    resolve = staticmethod(resolve_train)
    counts = staticmethod(count_training_videos)

    @classmethod
    def print_estimate(cls, plan: TrainPlan, config_yaml: str) -> None:
        print_estimates(plan, *cls.chosen(plan), config_yaml)

    @classmethod
    def chosen(cls, plan: TrainPlan) -> tuple[ResourceEstimate, str]:
        needs = estimate_resources(plan, cls.counts(plan))
        return choose_offload(needs, plan.config.model.offload, training_ways(plan, needs))

    def needed(self, needs: ResourceEstimate) -> dict[str, Any]:
        found, takes = super().needed(needs), estimate_seconds(self.plan)
        return {
            **found,
            "bytes": max(found["bytes"], training_ways(self.plan, needs)[needs.offload].card),
            "seconds": found["seconds"] + takes,
            "stages": {**found["stages"], "train": found["stages"].get("train", 0.0) + takes},
        }

    @property
    def names(self) -> dict[str, Any]:
        return {**super().names, "qat": {"name": self.config.qat.name}}

    def signed(self, protected: tuple[int, ...] | None) -> str:
        return signature(self.plan.counted(protected), self.fingerprint, self.device, (*MEASURES, "qat"))

    def run(self) -> dict[str, Any]:
        stage = self.run_.stage
        trainer, calibration, choice = self._prepared()
        pipeline = trainer.pipeline
        with stage("generate_bf16"):
            trajectories = record(pipeline, self.pairs, self.config.eval.single_steps)
            baseline = bf16_videos(pipeline, "generate BF16", self.shown)
        floors = self.noise_floors(pipeline, baseline)
        report = plan_conversion(pipeline.transformer, self.plan.scheme, choice.blocks, trainer.modules)
        untrained = self._untrained(trainer, baseline, trajectories)
        with stage("train"):
            training = self._trained(trainer)
        trained = self._trained_videos(trainer, trajectories)
        with stage("compare"):
            metrics, over = self._compared(baseline, untrained, trained, floors)
            judged = verdict(metrics, gates.check(trained.samples, baseline), len(self.pairs))
        with stage("write"):
            write_videos(self.run_.folder, self.plan, baseline, trained.samples, floors)
            if self.config.checkpoint:
                self._save(pipeline, report)
        tail = self.tail(trainer.calibrator, self.plan.pairs)
        tail["memory"]["peak_bytes"] = max(tail["memory"]["peak_bytes"], trainer.peak_before)
        return {
            **self.head(tuple(report.protected_blocks)),
            **conversion(self.plan, report, calibration, choice),
            "overflow": overflow(trained.counts, training.pop("overflowed_weights")),
            "qat": dataclasses.asdict(self.config.qat),
            "block_sqnr": None,
            "single_steps": {name: steps.as_json() for name, steps in trained.single_steps.items()},
            "over_untrained": over,
            "training": {**training, "processes": processes(), "precision": self.plan.precision},
            **judged,
            **tail,
        }

    def _prepared(self) -> tuple[Trainer, Calibration, Choice]:
        """The loaded model, calibrated, with its blocks chosen and the data of the training."""
        calibrator = self.load()
        with self.run_.stage("calibrate"):
            calibration, stats = calibrator.calibration(), calibrator.inputs()
        with self.run_.stage("choose"):
            choice = choose(self.config.protect, self.plan.model.protected, calibrator)
        trainer = Trainer(calibrator, self.plan, choice.blocks, stats)
        with self.run_.stage("data"):
            trainer.prepare()
        return trainer, calibration, choice

    def _untrained(self, trainer: Trainer, baseline: list[Sample], trajectories: Sequence[Trajectories]) -> Generated:
        """By the untrained baseline, which is PTQ's model; the model stays BF16."""
        if not self.config.qat.quantize:
            return Generated(baseline)
        calibrator, pipeline, label = trainer.calibrator, trainer.pipeline, "generate untrained"
        counted = calibrator.what_is_quantized(trainer.protected)
        how = (self.plan.scheme, trainer.protected, trainer.modules, trainer.stats)
        with quantized(pipeline.transformer, *how):
            with self.run_.stage("single_steps"):
                single_steps = {each.name: measure_steps(each, counted, self.config.force) for each in trajectories}
            with self.run_.stage("generate_untrained"):
                samples, counts = quantized_videos(pipeline, label, self.shown, counted)
        return Generated(samples, single_steps, counts)

    def _trained_videos(self, trainer: Trainer, trajectories: Sequence[Trajectories]) -> Generated:
        """The trained model's videos and single steps."""
        pipeline, label = trainer.pipeline, "generate trained"
        counted = {**trainer.calibrator.what_is_quantized(trainer.protected), "trained": trainer.signature}
        with self.run_.stage("single_steps"):
            single_steps = {each.name: measure_steps(each, counted, self.config.force) for each in trajectories}
        with self.run_.stage("generate_trained"):
            samples, counts = quantized_videos(pipeline, label, self.shown, counted, self.config.force)
        return Generated(samples, single_steps, counts if self.shown else single_steps[STEP_SQNR].counts)

    def _trained(self, trainer: Trainer) -> dict[str, Any]:
        """Puts the trained transformer into the pipeline, from the cache or trained now; returns ``Trainer.train``'s
        report."""
        pipeline, pipe, config = trainer.pipeline, trainer.pipeline.pipe, self.config
        if config.force:
            pipeline.cache.forget("trained", trainer.signature)
            shutil.rmtree(trainer.states, ignore_errors=True)

        def make(folder: Path) -> None:
            if processes() > 1:
                TrainJob.called = True
                broadcast_object_list([list(trainer.protected)])
            with live(config.tracker, self.run_.folder, dataclasses.asdict(config)) as trainer.show:
                report = trainer.train()
            for name, part in transformers_in(pipe).items():
                if quantized_linears(part):
                    save_transformer(part, self.plan.model.files.folder / name, folder / name, lambda: None)
                else:
                    part.save_pretrained(folder / name)
            report["overflowed_weights"] = overflowed_weights(pipeline.transformer)
            (folder / CURVES).write_text(json.dumps(report) + "\n", encoding="utf-8")

        folder = pipeline.artefact("train", "trained", trainer.signature, make)
        shutil.rmtree(trainer.states, ignore_errors=True)
        for name, part in transformers_in(pipe).items():
            placed = placement_of(part)
            part.to("meta")  # there is no room for both
            how = config.quant.packed if quantization_of(folder / name) is not None else None
            setattr(pipe, name, read_transformer(folder / name, how, placement=placed))
        found: dict[str, Any] = json.loads((folder / CURVES).read_text(encoding="utf-8"))
        return found

    def _compared(
        self, baseline: list[Sample], untrained: Generated, trained: Generated, floors: Floors
    ) -> tuple[dict[str, list[Item]], dict[str, Any]]:
        """Every metric, and by how much it differs from the untrained model's."""
        config, scenes, few = self.config, self.config.model.language == "scenes", len(self.pairs) < ENOUGH_PAIRS
        sides = {"": trained, UNTRAINED: untrained}
        beside = {prefix: list(zip(baseline, side.samples, strict=True)) for prefix, side in sides.items()} | floors
        found = compare_videos(self.plan, beside)
        for sample in untrained.samples if scenes else ():
            for name, value in of_pair(sample, None, True, Networks()).items():
                found.setdefault(UNTRAINED + name, []).append(Item(sample.prompt, sample.seed, value))
        # Where nothing is quantized, the untrained baseline has none.
        for prefix, side in sides.items():
            found |= {prefix + name: steps.items() for name, steps in side.single_steps.items()}
        over = {}
        # A model that is fine-tuned is meant to move away from what it was.
        for name in COMPARED if config.qat.quantize else ("attributes",):
            if name in found and UNTRAINED + name in found:
                paired = compared(difference(found[name], found[UNTRAINED + name]))
                told = {"verdict": verdict_of(paired, few), "could_see": detectable(paired)}
                over[name] = {**paired.as_json(), **told}
        return found, over

    def _save(self, pipeline: CachedPipeline, report: ConversionReport) -> None:
        target, converted = self.run_.folder / "checkpoint", report.names("converted")
        if converted:
            with progress("save", len(converted), "linear") as tick:
                save_quantized(pipeline.pipe, target, tick)
        else:
            with whole_folder(target) as partial:
                pipeline.pipe.save_pretrained(partial)
                seal(partial)


def verdict_of(paired: Estimate, few: bool) -> str:
    """Of trained less untrained."""
    if few:
        return "too few pairs"
    if math.isnan(paired.low):
        return "cannot be told"
    return "better" if paired.low > 0 else "worse" if paired.high < 0 else "no difference found"
