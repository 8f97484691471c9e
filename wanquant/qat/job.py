"""The training job: does quantization-aware training beat plain quantization here?

Data flows as in ``wanquant.ptq.job``, with the training between: load, calibrate, generate in BF16, generate with the
*untrained baseline*, which is what PTQ makes of the same model with the same protection, scales and seeds; train from
there; generate again from the same noise, compare all three, save, report.

    over_untrained.latent_sqnr   trained less untrained, pair by pair: the verdict is whether its interval holds 0
    over_untrained.step_sqnr   the same of single steps, along BF16's own trajectories

Without quantization (``qat=off``) the same loop fine-tunes the BF16 model, and the baseline is the model as it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list

from wanquant.evaluate import gates
from wanquant.evaluate.compare import measure
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges.perceptual import distance
from wanquant.evaluate.stats import ENOUGH_PAIRS, Estimate, Item, compared, difference, estimate
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.choose import Choice, choose
from wanquant.ptq.count import count_videos, estimate_resources
from wanquant.ptq.job import Job, run_job
from wanquant.ptq.plan import with_weights
from wanquant.ptq.result import conversion
from wanquant.ptq.sensitivity import quantized
from wanquant.qat.check import TrainPlan, counted, resolve_train
from wanquant.qat.config import TrainConfig, processes
from wanquant.qat.loop import make_accelerator
from wanquant.qat.plan import TrainingPlan, plan_training, shrinks, training_seconds
from wanquant.qat.train import Trainer, settled_precision, training_libraries
from wanquant.quant import ConversionReport, plan_conversion
from wanquant.runs.progress import progress
from wanquant.runs.signature import MEASURES, signature
from wanquant.runs.tracking import live
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoint import quantization_of, quantized_linears, save_quantized, save_transformer
from wanquant.wan.device import pick_device
from wanquant.wan.estimate import ResourceEstimate, VideoCounts, in_bytes, in_time, print_estimate, tokens_of
from wanquant.wan.experts import transformers_in
from wanquant.wan.generate import Sample
from wanquant.wan.load import hush_libraries, read_transformer
from wanquant.wan.record import Recording, step_errors

#: Measured against the untrained baseline, pair by pair. The first decides.
STEP_SQNR = "step_sqnr"
COMPARED = ("latent_sqnr", STEP_SQNR, "psnr", "ssim", "lpips", "attributes")
UNTRAINED, OVER = "untrained.", "over_untrained."
CURVES = "training.json"
#: What training adds on the device, in the plan.
ADDED = ("weights", "gradients", "optimizer", "average", "activations")


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
    plan = resolve_train(dataclasses.replace(config, eval=EvalConfig()))
    word: list[Any] = [None]
    broadcast_object_list(word)
    if word[0] is None:
        return
    torch.set_num_threads(plan.config.threads)
    hush_libraries()
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        calibrator = TrainJob(with_weights(plan)).load()
        trainer = Trainer(calibrator, plan, word[0], calibrator.inputs())
        trainer.prepare()
        trainer.train()


class TrainJob(Job):
    name: ClassVar[str] = "train"
    #: Whether the other processes were told to train.
    called: ClassVar[bool] = False

    @staticmethod
    def resolve(config: TrainConfig) -> TrainPlan:
        return resolve_train(config)

    @staticmethod
    def counts(plan: TrainPlan) -> VideoCounts:
        """As for a quantization, with the videos of the untrained baseline; what is learned from is recorded in BF16,
        and what is measured too."""
        counts, qat, measured, calibrated = count_videos(plan), plan.qat, len(plan.pairs), len(plan.calibration)
        baselines = 1 if qat.quantize else 0
        # Single steps are asked of both, with as many passes as a video has.
        quantized, looks = counts.quantized + (2 * baselines + 1) * measured, 0
        if qat.check_every:
            looks = (1 + qat.steps // qat.check_every) * calibrated
        return dataclasses.replace(
            counts,
            recorded=len(plan.learned),
            untrained=2 * baselines * measured,
            looks=looks,
            renamed=(("generate_quantized", "generate_trained"),),
            bf16=counts.bf16 + len(plan.learned) + (calibrated if looks else 0),
            quantized=quantized + looks,
            decoded=counts.decoded + baselines * measured,
            held=counts.held + baselines * measured,
            beside=counts.beside or bool(baselines),
        )

    @classmethod
    def print_estimate(cls, plan: TrainPlan, config_yaml: str) -> None:
        print_training_plan(plan, estimate_resources(plan, cls.counts(plan)), config_yaml)

    def needed(self, needs: ResourceEstimate) -> dict[str, Any]:
        found, on_host = super().needed(needs), needs.device.type == "cpu"
        training = needs_of(self.plan, needs)
        while_trained = 2 * needs.parameters + needs.others + training.added(on_host) + (needs.videos if on_host else 0)
        takes = seconds_of(self.plan, needs)
        return {
            **found,
            "bytes": max(found["bytes"], while_trained),
            "seconds": found["seconds"] + takes,
            "stages": {**found["stages"], "train": found["stages"].get("train", 0.0) + takes},
        }

    @property
    def names(self) -> dict[str, Any]:
        return {**super().names, "qat": {"name": self.config.qat.name}}

    def signed(self, protected: tuple[int, ...] | None) -> str:
        found = {
            **self.plan.counted(protected),
            "qat": counted(self.config.qat),
            "world": processes(),
            "libraries": training_libraries(),
        }
        return signature(found, self.fingerprint, self.device, (*MEASURES, "qat"))

    def run(self) -> dict[str, Any]:
        config, run = self.config, self.run_
        calibrator = self.load()
        pipeline = calibrator.pipeline
        with run.stage("calibrate"):
            calibration, stats = calibrator.calibration(), calibrator.inputs()
        with run.stage("choose"):
            choice = choose(config.protect, self.plan.model.protected, calibrator)
        trainer = Trainer(calibrator, self.plan, choice.blocks, stats)
        with run.stage("data"):
            trainer.prepare()
        with run.stage("generate_bf16"):
            asked = Recording(pipeline, self.pairs, "ask BF16")
            baseline = self.bf16(pipeline, "generate BF16", self.pairs)
        floors: dict[str, list[tuple[Sample, Sample]]] = {}
        if config.eval.noise_floor:
            with run.stage("noise_floor"):
                floors = self.floors(pipeline, baseline)
        with run.stage("generate_untrained"):
            report, untrained, single_steps = self._untrained(calibrator, choice, stats, baseline, asked)
        with run.stage("train"):
            signed, training = self._trained(trainer)
        with run.stage("generate_trained"):
            label, how = "generate trained", {**calibrator.what_is_quantized(choice.blocks), "trained": signed}
            latents, overflows = pipeline.latents(label, self.pairs, how, afresh=config.force)
            samples = pipeline.videos(label, self.pairs, latents)
            single_steps |= self._single_steps(pipeline, asked, "", how)
        with run.stage("compare"):
            beside = {
                "": list(zip(baseline, samples, strict=True)),
                UNTRAINED: list(zip(baseline, untrained, strict=True)),
            }
            metrics, over = self._compare({**beside, **floors}, untrained, single_steps)
            gate_results = gates.check(samples, baseline)
        with run.stage("write"):
            self.write_videos(baseline, samples, floors)
            self._save(pipeline, report)
        tail = self.tail(calibrator, self.plan.pairs)
        tail["memory"]["peak_bytes"] = max(tail["memory"]["peak_bytes"], trainer.peak_before)
        return {
            **self.head(tuple(report.protected_blocks)),
            **conversion(self.plan, report, calibration, choice, overflows),
            "qat": dataclasses.asdict(config.qat),
            "block_sqnr": None,
            "metrics": metrics,
            "over_untrained": over,
            "training": {**training, "processes": processes(), "precision": trainer.precision},
            "demonstration": len(self.pairs) < ENOUGH_PAIRS,
            "verdict": "pass" if all(gate.passed for gate in gate_results) else "fail",
            "gates": {gate.name: gate.as_json() for gate in gate_results},
            **tail,
        }

    def _untrained(
        self, calibrator: Calibrator, choice: Choice, stats: Mapping[str, Any], baseline: list[Sample], asked: Recording
    ) -> tuple[ConversionReport, list[Sample], dict[str, list[Item]]]:
        """What PTQ makes of it, its videos and the errors of its single steps; the model stays BF16."""
        transformer, how = (
            calibrator.pipeline.transformer,
            (calibrator.scheme.config, choice.blocks, calibrator.modules),
        )
        if not self.config.qat.quantize:
            return plan_conversion(transformer, *how), baseline, {}
        label, what = "generate untrained", calibrator.what_is_quantized(choice.blocks)
        with quantized(transformer, *how, stats) as report:
            latents, _ = calibrator.pipeline.latents(label, self.pairs, what)
            single_steps = self._single_steps(calibrator.pipeline, asked, UNTRAINED, what)
        return report, calibrator.pipeline.videos(label, self.pairs, latents), single_steps

    def _single_steps(
        self, pipeline: CachedPipeline, asked: Recording, prefix: str, how: Mapping[str, Any]
    ) -> dict[str, list[Item]]:
        """The errors of single steps, under their name in ``metrics``."""

        def measure() -> list[float]:
            with progress("single steps", len(self.pairs), "pair") as tick:
                return step_errors(pipeline, asked, tick)

        cells = pipeline.cache.cells(
            "single_steps", pipeline.signature("single_steps", pairs=self.pairs, batch=pipeline.model.batch, **how)
        )
        found = measure() if self.config.force else cells.measured("pairs", measure)
        values = (math.nan if value is None else value for value in found)
        return {f"{prefix}{STEP_SQNR}": [Item(*pair, value) for pair, value in zip(self.pairs, values, strict=True)]}

    def _trained(self, trainer: Trainer) -> tuple[str, dict[str, Any]]:
        """Puts the trained transformer into the pipeline: from the cache, or trained now."""
        pipeline, signed = trainer.pipeline, trainer.signature
        if self.config.force:
            pipeline.cache.forget("trained", signed)
            shutil.rmtree(trainer.states, ignore_errors=True)

        def make(folder: Path) -> None:
            if processes() > 1:
                TrainJob.called = True
                broadcast_object_list([list(trainer.protected)])
            with live(self.config.tracker, self.run_.folder, dataclasses.asdict(self.config)) as trainer.show:
                told = trainer.train()
            for name, part in transformers_in(pipeline.pipe).items():
                if quantized_linears(part):
                    save_transformer(part, self.plan.model.folder / name, folder / name, lambda: None)
                else:
                    part.save_pretrained(folder / name)
            (folder / CURVES).write_text(json.dumps(told) + "\n", encoding="utf-8")

        folder = pipeline.artefact("train", "trained", signed, make)
        shutil.rmtree(trainer.states, ignore_errors=True)
        packed = self.config.quant.packed if self.config.qat.quantize else None
        for name in transformers_in(pipeline.pipe):
            getattr(pipeline.pipe, name).to("meta")  # there is no room for both
            how = packed if quantization_of(folder / name) is not None else None
            setattr(pipeline.pipe, name, read_transformer(folder / name, how).to(pipeline.device))
        told: dict[str, Any] = json.loads((folder / CURVES).read_text(encoding="utf-8"))
        return signed, told

    def _compare(
        self,
        beside: Mapping[str, list[tuple[Sample, Sample]]],
        untrained: list[Sample],
        single_steps: dict[str, list[Item]],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every metric, and what of it differs from the untrained model's."""
        config = self.config
        with progress("compare", sum(map(len, beside.values())), "pair") as tick:
            lpips = distance(config.eval.lpips, self.device)
            found = measure(beside, config.model.language == "scenes", tick, lpips)
            if config.model.language == "scenes":
                asked = measure({"": [(sample, sample) for sample in untrained]}, True)
                found |= {
                    UNTRAINED + name: asked[name] for name in asked if "." not in name and UNTRAINED + name not in found
                }
        found |= single_steps
        over = {}
        # A model that is fine-tuned is meant to move away from what it was.
        for name in COMPARED if config.qat.quantize else ("attributes",):
            if name in found and UNTRAINED + name in found:
                paired = compared(difference(found[name], found[UNTRAINED + name]))
                over[name] = {**paired.as_json(), "verdict": verdict_of(paired, len(self.pairs) < ENOUGH_PAIRS)}
        return {name: estimate(items).as_json() for name, items in found.items()}, over

    def _save(self, pipeline: CachedPipeline, report: ConversionReport) -> None:
        if not self.config.checkpoint:
            return
        target = self.run_.folder / "checkpoint"
        if report.names("converted"):
            with progress("save", len(report.names("converted")), "linear") as tick:
                save_quantized(pipeline.pipe, target, tick)
        else:
            partial = target.with_name("checkpoint.partial")
            pipeline.pipe.save_pretrained(partial)
            partial.rename(target)


def needs_of(plan: TrainPlan, needs: ResourceEstimate) -> TrainingPlan:
    """Memory of the training itself."""
    tokens, precision = tokens_of(plan.settings, needs.shape), settled_precision(plan.qat.precision, plan.device)
    return plan_training(needs.shape, plan.config, tokens, plan.samples, precision, processes())


def seconds_of(plan: TrainPlan, needs: ResourceEstimate) -> float:
    """Of the training itself, by a probe of one block."""
    tokens, precision = tokens_of(plan.settings, needs.shape), settled_precision(plan.qat.precision, plan.device)
    return training_seconds(needs.shape, plan.config, tokens, plan.samples, plan.device, precision)


def print_training_plan(plan: TrainPlan, needs: ResourceEstimate, config_yaml: str) -> None:
    """After that of the quantization: what the training needs."""
    print_estimate(needs, config_yaml)
    training = needs_of(plan, needs)
    parts = {name: getattr(training, name) for name in ("model", *ADDED)}
    told = ", ".join(f"{name} {in_bytes(value)}" for name, value in parts.items() if value)
    print(f"training    {in_bytes(training.total)} on the device: {told}")
    if training.host:
        passing = min(plan.samples, plan.qat.samples or plan.samples)
        print(f"            {in_bytes(training.host)} beside it, for what passes between blocks ({passing} samples)")
    if shrinks(plan.config):
        print(f"            less with {shrinks(plan.config)}")
    seconds = seconds_of(plan, needs)
    print(
        f"            {in_time(seconds)}, by a probe of one block; with the videos {in_time(seconds + needs.seconds)}"
    )


def verdict_of(paired: Estimate, few: bool) -> str:
    """Of trained less untrained."""
    if few:
        return "too few pairs"
    if math.isnan(paired.low):
        return "cannot be told"
    if paired.low > 0:
        return "better"
    return "worse" if paired.high < 0 else "no difference found"
