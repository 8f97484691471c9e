"""The PTQ job: what does it cost to quantize all blocks but these?

config → plan (``wanquant.ptq.plan``) → load, calibrate, choose, BF16 baseline, noise floor, quantize, generate,
compare, write → ``result.json`` → report. Everything that can be refused is refused before the first video;
``result.json`` is written last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from wanquant.evaluate import gates
from wanquant.evaluate.single_steps import SingleSteps, Trajectories, measure_steps, record
from wanquant.ptq.analyze import analyze, write_analysis
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.convert import run_convert
from wanquant.ptq.estimate import count_videos, estimate_resources, predicted, start_and_end
from wanquant.ptq.generating import bf16_videos, compare_videos, noise_floors, quantize_transformer, quantized_videos
from wanquant.ptq.plan import PTQPlan, resolve
from wanquant.ptq.protect import choose
from wanquant.ptq.result import (
    conversion,
    head,
    lost_to_fp8,
    names_of,
    overflow,
    overflowed_weights,
    tail,
    verdict,
    write_readme,
    write_videos,
)
from wanquant.ptq.running import run_job
from wanquant.quant import ConversionReport
from wanquant.runs import launch
from wanquant.runs.cache import Cache
from wanquant.runs.finished import find_finished, note_finished, take_over
from wanquant.runs.progress import progress
from wanquant.runs.reports.columns import STEP_SQNR
from wanquant.runs.reports.report import summary, write_report
from wanquant.runs.run import Run, digest
from wanquant.runs.signature import provenance, signature
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.checkpoints.checkpoint import save_quantized
from wanquant.wan.checkpoints.model_files import count_files, fingerprint
from wanquant.wan.device import forget_peak_memory, peak_memory
from wanquant.wan.experts import whole_of
from wanquant.wan.generate import Sample
from wanquant.wan.load import LOAD_PARTS, load_pipeline
from wanquant.wan.lora import add_loras_, describe_loras
from wanquant.wan.outliers import plant_outliers_
from wanquant.wan.resources.choice import choose as choose_offload
from wanquant.wan.resources.estimate import GUESS, ResourceEstimate, VideoCounts
from wanquant.wan.resources.placement import Placement
from wanquant.wan.resources.printed import in_time, print_estimate


def run_ptq(config: PTQConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """Runs the job in ``folder`` and returns the result as written, or None after a dry run. What is finished already,
    here or in another folder, is not run again unless ``config.force``.

    ``ValueError`` and ``OSError`` are the user's; whatever else goes wrong, ``result.json`` says failed.
    """
    if config.mode == "convert":
        return run_convert(config, folder, config_yaml) if launch.first() else None
    return run_job(config, folder, config_yaml, Job)


@dataclass
class Job:
    """A plan that is carried out in a run directory, or found to be finished; without one (``run_``), by a process of a
    launch that is not the first, as far as it is shared work."""

    name: ClassVar[str] = "ptq"
    plan: Any

    @staticmethod
    def resolve(config: Any) -> PTQPlan:
        return resolve(config)

    @staticmethod
    def counts(plan: Any) -> VideoCounts:
        return count_videos(plan)

    @classmethod
    def print_estimate(cls, plan: Any, config_yaml: str) -> None:
        needs, told = cls.chosen(plan)
        print_estimate(needs, config_yaml, start_and_end(plan.config.tracker.name), told)

    @classmethod
    def chosen(cls, plan: Any) -> tuple[ResourceEstimate, str]:
        """What it needs with its weights where they fit, and what to say of that."""
        return choose_offload(estimate_resources(plan, cls.counts(plan)), plan.config.model.offload)

    def __post_init__(self) -> None:
        self.run_: Any = None
        self.planned_: dict[str, Any] = {}
        self.begun = 0
        self.config, self.device, self.pairs = self.plan.config, self.plan.device, list[Pair](self.plan.pairs)
        self.shown = self.pairs if self.config.eval.videos else []
        self.with_checkpoint = self.config.checkpoint and self.config.mode == "quantize"
        self.cache = Cache(Path(self.config.cache))
        files, loras = self.plan.model.files, describe_loras(self.config.model)
        with progress("read", count_files(files), "file") as tick:
            self.fingerprint = fingerprint(files, tick, loras, self.config.verify)

    @property
    def names(self) -> dict[str, Any]:
        return names_of(self.config)

    def signed(self, protected: tuple[int, ...] | None) -> str:
        return signature(self.plan.counted(protected), self.fingerprint, self.device)

    @property
    def asked(self) -> str:
        """The signature by which a finished run is found before anything is loaded."""
        return self.signed(self.plan.model.protected if self.config.mode == "quantize" else None)

    def finished(self, folder: Path) -> Path | None:
        wanted: dict[str, Any] = {"fps": self.config.model.generation.fps}
        if self.with_checkpoint:
            wanted["packed"] = self.plan.scheme.packed
        return find_finished(self.cache, self.asked, folder, wanted)

    def carry_out(self, run: Run, known: Path | None, kept: dict[str, Any]) -> dict[str, Any]:
        """Runs, or takes over what another folder holds; ``kept`` are evaluations of the same videos."""
        self.run_ = run
        try:
            if known is not None:
                result = take_over(run, known, self.names, self.with_checkpoint, kept)
            else:
                result = {**(self.analyze() if self.config.mode == "analyze" else self.run()), "asked": self.asked}
                result |= {"evaluations": kept} if kept else {}
            full = run.finish(result, lambda complete: write_report(run.folder, complete))
        except BaseException as error:
            run.fail(error)
            raise
        note_finished(self.cache, self.asked, run.folder)
        print(summary(full, run.folder))
        return full

    def run(self) -> dict[str, Any]:
        config, stage = self.config, self.stage
        calibrator = self.load()
        pipeline = calibrator.pipeline
        with stage("calibrate"):
            calibration, stats = calibrator.calibration(), calibrator.inputs()
            calibrator.hessians()
        with stage("choose"):
            choice = choose(config.protect, self.plan.model.protected, calibrator)
            block_sqnr = calibrator.block_sqnr(choice.blocks).as_json() if config.eval.block_sqnr else None
        with stage("generate_bf16"):
            trajectories = record(pipeline, self.pairs, config.eval.single_steps)
            baseline = bf16_videos(pipeline, "generate BF16", self.shown)
        floors = self.noise_floors(pipeline, baseline)
        with stage("quantize"):
            report = quantize_transformer(calibrator, choice.blocks, stats)
            weights = overflowed_weights(pipeline.transformer)
        how = calibrator.what_is_quantized(report.protected_blocks)
        single_steps, samples, counts = self._quantized(pipeline, trajectories, how)
        if self.run_ is None:
            return {}
        with stage("compare"):
            metrics = {name: steps.items() for name, steps in single_steps.items()}
            metrics |= compare_videos(self.plan, {"": list(zip(baseline, samples, strict=True)), **floors})
            gate_results = gates.check(samples, baseline)
        with stage("write"):
            write_videos(self.run_.folder, self.plan, baseline, samples, floors)
            self.save(pipeline, report)
        return {
            **self.head(tuple(report.protected_blocks)),
            **conversion(self.plan, report, calibration, choice),
            "overflow": overflow(counts, weights),
            **lost_to_fp8(self.plan.scheme, pipeline.transformer, counts),
            "block_sqnr": block_sqnr,
            "single_steps": {name: steps.as_json() for name, steps in single_steps.items()},
            **verdict(metrics, gate_results, len(self.pairs)),
            **self.tail(calibrator, self.plan.pairs),
        }

    def _quantized(
        self, pipeline: CachedPipeline, trajectories: Sequence[Trajectories], how: dict[str, Any]
    ) -> tuple[dict[str, SingleSteps], list[Sample], Counter[str]]:
        """Single steps and videos of the quantized model, and what its linears counted."""
        label, force = f"generate {self.config.quant.format}", self.config.force
        with self.stage("single_steps"):
            single_steps = {each.name: measure_steps(each, how, force) for each in trajectories}
        with self.stage("generate_quantized"):
            samples, counts = quantized_videos(pipeline, label, self.shown, how, force)
        return single_steps, samples, counts if self.shown else single_steps[STEP_SQNR].counts

    def analyze(self) -> dict[str, Any]:
        calibrator = self.load()
        with self.stage("calibrate"):
            calibrator.calibration(full=True)
        with self.stage("analyze"):
            analysis = analyze(self.plan, calibrator)
        if self.run_ is None:
            return {}
        write_analysis(analysis["analysis"], calibrator, self.run_.folder / "analysis")
        return {**self.head(None), **analysis, **self.tail(calibrator, self.plan.calibration)}

    def stage(self, name: str) -> AbstractContextManager[None]:
        stage: AbstractContextManager[None] = nullcontext() if self.run_ is None else self.run_.stage(name)
        return stage

    def load(self) -> Calibrator:
        needs, told = self.chosen(self.plan)
        launch.once("planned", lambda: self.predict(needs, told))  # which measures speed: the others wait
        forget_peak_memory(self.device)
        self.begun = peak_memory(self.device)
        with self.stage("load"):
            self.made = provenance(self.device)
            with progress("load", LOAD_PARTS, "part") as tick:
                placement = Placement(self.device, needs.offload, self.cache.root / "offload")
                # Its sums have been checked by the fingerprint.
                pipe = load_pipeline(self.plan.model.files, on_part=tick, placement=placement, verify=False)
            add_loras_(whole_of(pipe), self.config.model)
            plant_outliers_(whole_of(pipe), self.config.model.outliers)
        pipeline = CachedPipeline(
            pipe, self.config.model, self.fingerprint, self.device, self.cache, self.plan.pictures
        )
        modules, bins = tuple(self.config.protect.modules), self.config.analysis.bins
        single_steps = self.config.eval.single_steps
        how = (bins, modules, single_steps, needs.hessian_blocks)
        return Calibrator(pipeline, self.plan.scheme, list(self.plan.calibration), *how)

    def predict(self, needs: ResourceEstimate, told: str) -> None:
        with self.stage("plan"):
            self.planned_ = self.predicted(needs)
        guess, start = GUESS if self.planned_["guess"] else "", self.planned_["stages"]["start"]
        takes = f"{in_time(self.planned_['seconds'])} in all, of which {in_time(start)} are over"
        said = filter(None, [f"predicted: {takes}; what the cache holds takes none{guess}", told])
        print(*said, sep="\n", flush=True)

    def predicted(self, needs: ResourceEstimate) -> dict[str, Any]:
        """What it would take from the beginning, with nothing in the cache."""
        cells = self.cache.cells("plans", digest([self.signed(None), self.plan.scheme.packed, needs.offload]))
        return predicted(needs, cells, self.config.tracker.name, self.needed)

    def needed(self, needs: ResourceEstimate) -> dict[str, Any]:
        return {"bytes": needs.added, "seconds": needs.seconds, "stages": needs.stages, "guess": needs.guess}

    def noise_floors(self, pipeline: CachedPipeline, baseline: list[Sample]) -> dict[str, list[tuple[Sample, Sample]]]:
        """The stage, where the config asks for it."""
        if not (self.config.eval.noise_floor and baseline):
            return {}
        with self.stage("noise_floor"):
            return noise_floors(self.plan, pipeline, baseline)

    def save(self, pipeline: CachedPipeline, report: ConversionReport) -> None:
        """The checkpoint, if it is asked for and anything is quantized."""
        if self.config.checkpoint and report.names("converted"):
            with progress("save", len(report.names("converted")), "linear") as tick:
                save_quantized(pipeline.pipe, self.run_.folder / "checkpoint", tick)
            write_readme(self.run_.folder / "checkpoint", self.config.model)

    def head(self, protected: tuple[int, ...] | None) -> dict[str, Any]:
        return {"signature": self.signed(protected), **head(self.plan, self.fingerprint)}

    def tail(self, calibrator: Calibrator, pairs: Sequence[Pair]) -> dict[str, Any]:
        """How it was made, and what of memory it took beside what was predicted."""
        made = {**self.made, "from_cache": calibrator.pipeline.reused, **launch.shares()}
        return tail(self.plan, pairs, (self.begun, peak_memory(self.device)), self.planned_, made)
