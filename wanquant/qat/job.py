"""The training job: does quantization-aware training beat plain quantization here?

Data flows as in ``wanquant.ptq.job``, with the training between: load, calibrate, generate in BF16, generate with the
*twin*, which is what PTQ makes of the same model with the same protection, scales and seeds; train from there; generate
again from the same noise, compare all three, save, report.

    over_twin.latent_sqnr   trained less twin, pair by pair: the verdict is whether its interval holds 0
    over_twin.answer_sqnr   the same of single steps, along BF16's own trajectories

Without quantization (``qat=off``) the same loop fine-tunes the BF16 model, and the twin is the model as it was.
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
from wanquant.evaluate.perceptual import distance
from wanquant.evaluate.stats import ENOUGH_PAIRS, Estimate, Item, compared, difference, estimate
from wanquant.ptq.bench import Bench
from wanquant.ptq.choose import Choice, choose
from wanquant.ptq.job import Job, run_job
from wanquant.ptq.plan import with_weights
from wanquant.ptq.result import conversion
from wanquant.ptq.sensitivity import quantized
from wanquant.ptq.work import make_plan, work_of
from wanquant.qat.check import TrainPlan, counted, resolve_train
from wanquant.qat.config import TrainConfig, processes
from wanquant.qat.loop import make_accelerator
from wanquant.qat.plan import TrainingPlan, plan_training, shrinks, training_seconds
from wanquant.qat.train import Trainer, settled_precision, training_libraries
from wanquant.quant import ConversionReport, plan_conversion
from wanquant.runs.progress import progress
from wanquant.runs.signature import MEASURES, signature
from wanquant.runs.tracking import live
from wanquant.wan.checkpoint import quantization_of, quantized_linears, save_quantized, save_transformer
from wanquant.wan.device import pick_device
from wanquant.wan.experts import transformers_in
from wanquant.wan.generate import Sample
from wanquant.wan.load import hush_libraries, read_transformer
from wanquant.wan.plan import Plan, Work, in_bytes, in_time, print_plan, tokens_of
from wanquant.wan.record import Recording, answer_errors
from wanquant.wan.studio import Studio

#: Measured against the twin, pair by pair. The first decides.
ANSWERS = "answer_sqnr"
COMPARED = ("latent_sqnr", ANSWERS, "psnr", "ssim", "lpips", "attributes")
TWIN, OVER = "twin.", "over_twin."
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
        bench = TrainJob(with_weights(plan)).load()
        trainer = Trainer(bench, plan, word[0], bench.inputs())
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
    def work(plan: TrainPlan) -> Work:
        """That of a quantization, twice where there is a twin; what is learned from is recorded in BF16, and what is
        measured too."""
        work, qat, measured, calibrated = work_of(plan), plan.qat, len(plan.pairs), len(plan.calibration)
        twins = 1 if qat.quantize else 0
        # Single steps are asked of both, with as many passes as a video has.
        quantized, looks = work.quantized + (2 * twins + 1) * measured, 0
        if qat.check_every:
            looks = (1 + qat.steps // qat.check_every) * calibrated
        return dataclasses.replace(
            work,
            recorded=len(plan.learned),
            twin=2 * twins * measured,
            looks=looks,
            renamed=(("generate_quantized", "generate_trained"),),
            bf16=work.bf16 + len(plan.learned) + (calibrated if looks else 0),
            quantized=quantized + looks,
            decoded=work.decoded + twins * measured,
            held=work.held + twins * measured,
            beside=work.beside or bool(twins),
        )

    @classmethod
    def print_plan(cls, plan: TrainPlan, config_yaml: str) -> None:
        print_training_plan(plan, make_plan(plan, cls.work(plan)), config_yaml)

    def needed(self, needs: Plan) -> dict[str, Any]:
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
        bench = self.load()
        studio = bench.studio
        with run.stage("calibrate"):
            calibration, stats = bench.calibration(), bench.inputs()
        with run.stage("choose"):
            choice = choose(config.protect, self.plan.model.protected, bench)
        trainer = Trainer(bench, self.plan, choice.blocks, stats)
        with run.stage("data"):
            trainer.prepare()
        with run.stage("generate_bf16"):
            asked = Recording(studio, self.pairs, "ask BF16")
            baseline = self.bf16(studio, "generate BF16", self.pairs)
        floors: dict[str, list[tuple[Sample, Sample]]] = {}
        if config.eval.noise_floor:
            with run.stage("noise_floor"):
                floors = self.floors(studio, baseline)
        with run.stage("generate_twin"):
            report, twin, answers = self._twin(bench, choice, stats, baseline, asked)
        with run.stage("train"):
            signed, training = self._trained(trainer)
        with run.stage("generate_trained"):
            label, how = "generate trained", {**bench.what_is_quantized(choice.blocks), "trained": signed}
            latents, overflows = studio.latents(label, self.pairs, how, afresh=config.force)
            samples = studio.videos(label, self.pairs, latents)
            answers |= self._answers(studio, asked, "", how)
        with run.stage("compare"):
            beside = {"": list(zip(baseline, samples, strict=True)), TWIN: list(zip(baseline, twin, strict=True))}
            metrics, over = self._compare({**beside, **floors}, twin, answers)
            gate_results = gates.check(samples, baseline)
        with run.stage("write"):
            self.write_videos(baseline, samples, floors)
            self._save(studio, report)
        tail = self.tail(bench, self.plan.pairs)
        tail["memory"]["peak_bytes"] = max(tail["memory"]["peak_bytes"], trainer.peak_before)
        return {
            **self.head(tuple(report.protected_blocks)),
            **conversion(self.plan, report, calibration, choice, overflows),
            "qat": dataclasses.asdict(config.qat),
            "block_sqnr": None,
            "metrics": metrics,
            "over_twin": over,
            "training": {**training, "processes": processes(), "precision": trainer.precision},
            "demonstration": len(self.pairs) < ENOUGH_PAIRS,
            "verdict": "pass" if all(gate.passed for gate in gate_results) else "fail",
            "gates": {gate.name: gate.as_json() for gate in gate_results},
            **tail,
        }

    def _twin(
        self, bench: Bench, choice: Choice, stats: Mapping[str, Any], baseline: list[Sample], asked: Recording
    ) -> tuple[ConversionReport, list[Sample], dict[str, list[Item]]]:
        """What PTQ makes of it, its videos and the errors of its answers; the model stays BF16."""
        transformer, how = bench.studio.transformer, (bench.scheme.config, choice.blocks, bench.modules)
        if not self.config.qat.quantize:
            return plan_conversion(transformer, *how), baseline, {}
        label, what = "generate twin", bench.what_is_quantized(choice.blocks)
        with quantized(transformer, *how, stats) as report:
            latents, _ = bench.studio.latents(label, self.pairs, what)
            answers = self._answers(bench.studio, asked, TWIN, what)
        return report, bench.studio.videos(label, self.pairs, latents), answers

    def _answers(self, studio: Studio, asked: Recording, prefix: str, how: Mapping[str, Any]) -> dict[str, list[Item]]:
        """The errors of single steps, under their name in ``metrics``."""

        def measure() -> list[float]:
            with progress("answer", len(self.pairs), "pair") as tick:
                return answer_errors(studio, asked, tick)

        cells = studio.cache.cells(
            "answers", studio.signature("answers", pairs=self.pairs, batch=studio.model.batch, **how)
        )
        found = measure() if self.config.force else cells.measured("pairs", measure)
        values = (math.nan if value is None else value for value in found)
        return {f"{prefix}{ANSWERS}": [Item(*pair, value) for pair, value in zip(self.pairs, values, strict=True)]}

    def _trained(self, trainer: Trainer) -> tuple[str, dict[str, Any]]:
        """Puts the trained transformer into the pipeline: from the cache, or trained now."""
        studio, signed = trainer.studio, trainer.signature
        if self.config.force:
            studio.cache.forget("trained", signed)
            shutil.rmtree(trainer.states, ignore_errors=True)

        def make(folder: Path) -> None:
            if processes() > 1:
                TrainJob.called = True
                broadcast_object_list([list(trainer.protected)])
            with live(self.config.tracker, self.run_.folder, dataclasses.asdict(self.config)) as trainer.show:
                told = trainer.train()
            for name, part in transformers_in(studio.pipe).items():
                if quantized_linears(part):
                    save_transformer(part, self.plan.model.folder / name, folder / name, lambda: None)
                else:
                    part.save_pretrained(folder / name)
            (folder / CURVES).write_text(json.dumps(told) + "\n", encoding="utf-8")

        folder = studio.artefact("train", "trained", signed, make)
        shutil.rmtree(trainer.states, ignore_errors=True)
        packed = self.config.quant.packed if self.config.qat.quantize else None
        for name in transformers_in(studio.pipe):
            getattr(studio.pipe, name).to("meta")  # there is no room for both
            how = packed if quantization_of(folder / name) is not None else None
            setattr(studio.pipe, name, read_transformer(folder / name, how).to(studio.device))
        told: dict[str, Any] = json.loads((folder / CURVES).read_text(encoding="utf-8"))
        return signed, told

    def _compare(
        self,
        beside: Mapping[str, list[tuple[Sample, Sample]]],
        twin: list[Sample],
        answers: dict[str, list[Item]],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every metric, and what of it differs from the twin's."""
        config = self.config
        with progress("compare", sum(map(len, beside.values())), "pair") as tick:
            lpips = distance(config.eval.lpips, self.device)
            found = measure(beside, config.model.language == "scenes", tick, lpips)
            if config.model.language == "scenes":
                asked = measure({"": [(sample, sample) for sample in twin]}, True)
                found |= {TWIN + name: asked[name] for name in asked if "." not in name and TWIN + name not in found}
        found |= answers
        over = {}
        # A model that is fine-tuned is meant to move away from what it was.
        for name in COMPARED if config.qat.quantize else ("attributes",):
            if name in found and TWIN + name in found:
                paired = compared(difference(found[name], found[TWIN + name]))
                over[name] = {**paired.as_json(), "verdict": verdict_of(paired, len(self.pairs) < ENOUGH_PAIRS)}
        return {name: estimate(items).as_json() for name, items in found.items()}, over

    def _save(self, studio: Studio, report: ConversionReport) -> None:
        if not self.config.checkpoint:
            return
        target = self.run_.folder / "checkpoint"
        if report.names("converted"):
            with progress("save", len(report.names("converted")), "linear") as tick:
                save_quantized(studio.pipe, target, tick)
        else:
            partial = target.with_name("checkpoint.partial")
            studio.pipe.save_pretrained(partial)
            partial.rename(target)


def needs_of(plan: TrainPlan, needs: Plan) -> TrainingPlan:
    """Memory of the training itself."""
    tokens, precision = tokens_of(plan.settings, needs.shape), settled_precision(plan.qat.precision, plan.device)
    return plan_training(needs.shape, plan.config, tokens, plan.questions, precision, processes())


def seconds_of(plan: TrainPlan, needs: Plan) -> float:
    """Of the training itself, by a probe of one block."""
    tokens, precision = tokens_of(plan.settings, needs.shape), settled_precision(plan.qat.precision, plan.device)
    return training_seconds(needs.shape, plan.config, tokens, plan.questions, plan.device, precision)


def print_training_plan(plan: TrainPlan, needs: Plan, config_yaml: str) -> None:
    """After that of the quantization: what the training needs."""
    print_plan(needs, config_yaml)
    training = needs_of(plan, needs)
    parts = {name: getattr(training, name) for name in ("model", *ADDED)}
    told = ", ".join(f"{name} {in_bytes(value)}" for name, value in parts.items() if value)
    print(f"training    {in_bytes(training.total)} on the device: {told}")
    if training.host:
        passing = min(plan.questions, plan.qat.questions or plan.questions)
        print(f"            {in_bytes(training.host)} beside it, for what passes between blocks ({passing} questions)")
    if shrinks(plan.config):
        print(f"            less with {shrinks(plan.config)}")
    seconds = seconds_of(plan, needs)
    print(
        f"            {in_time(seconds)}, by a probe of one block; with the videos {in_time(seconds + needs.seconds)}"
    )


def verdict_of(paired: Estimate, few: bool) -> str:
    """Of trained less twin."""
    if few:
        return "too few pairs"
    if math.isnan(paired.low):
        return "cannot be told"
    if paired.low > 0:
        return "better"
    return "worse" if paired.high < 0 else "no difference found"
