"""The PTQ job: what does it cost to quantize all blocks but these?

Data flows straight through: load, calibrate in BF16, generate in BF16, quantize, generate again
from the same noise, compare, save, report. Everything that can be refused is refused before the
first video; ``result.json`` is written last.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from wanquant.evaluate import gates
from wanquant.evaluate.compare import measure
from wanquant.evaluate.job import evaluate_run, note_not_judged
from wanquant.evaluate.perceptual import distance
from wanquant.evaluate.prompts import PromptsConfig, pairs
from wanquant.evaluate.stats import ENOUGH_PAIRS, estimate
from wanquant.kernels import check_native
from wanquant.ptq.analyze import analyze
from wanquant.ptq.bench import Bench
from wanquant.ptq.calibrate import Calibration
from wanquant.ptq.check import check, identity, rule_blocks, settle_config
from wanquant.ptq.choose import Choice, choose
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.convert import run_convert
from wanquant.ptq.stages import start_and_end
from wanquant.ptq.work import make_plan, other_seed, work_of
from wanquant.quant import ConversionReport, plan_conversion, quantize_
from wanquant.quant.statistics import RESIDUAL, Site
from wanquant.runs import pictures
from wanquant.runs.cache import Cache
from wanquant.runs.finished import by, find_finished, in_use, note_finished, take_over
from wanquant.runs.progress import progress
from wanquant.runs.report import summary, write_report
from wanquant.runs.run import Run, digest, read_result, refused_leave_no_result
from wanquant.runs.signature import provenance, signature
from wanquant.runs.tracking import mirror
from wanquant.wan.checkpoint import save_quantized
from wanquant.wan.device import forget_peak_memory, one_card, peak_memory, pick_device
from wanquant.wan.experts import shape_of_whole, whole_of
from wanquant.wan.generate import Sample
from wanquant.wan.load import (
    FOLDS,
    LOAD_PARTS,
    check_folder,
    count_files,
    find_folder,
    fingerprint,
    hush_libraries,
    load_pipeline,
)
from wanquant.wan.outliers import chosen_blocks, plant_outliers_
from wanquant.wan.plan import GUESS, Plan, Work, in_time, print_plan
from wanquant.wan.products import multiplies_bf16
from wanquant.wan.studio import Pair, Studio

#: Videos on the contact sheet at most.
SHEET_ROWS = 12


def run_ptq(config: PTQConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """Runs the job in ``folder`` and returns the result as written, or None after a dry run. What is finished already,
    here or in another folder, is not run again unless ``config.force``.

    ``ValueError`` and ``OSError`` are the user's; whatever else goes wrong, ``result.json`` says failed.
    """
    if config.mode == "convert":
        return run_convert(config, folder, config_yaml)
    return run_job(config, folder, config_yaml, Job)


def run_job(config: PTQConfig, folder: Path, config_yaml: str, kind: type[Job]) -> dict[str, Any] | None:
    """``run_ptq`` for any job that quantizes a model and measures what became of it."""
    with refused_leave_no_result(folder) if not config.dry_run else nullcontext():
        config = kind.settle(config)
        pairs_, calibration_pairs = pairs(config.prompts), pairs(config.calib, "calib")
        device = pick_device(config.model.device)
        kind.check(config)
        torch.set_num_threads(config.threads)
        if not config.dry_run:
            if config.quant.product == "native":
                check_native(device)
            model_folder = find_folder(config.model.path)
            check_folder(model_folder)
    settings = config.model.generation
    shown = calibration_pairs if config.mode == "analyze" else pairs_
    print(
        f"{config.quant.name} on {config.model.name} ({device.type}, {config.threads} "
        f"thread{'s' if config.threads > 1 else ''}), protect {config.protect.name}: {len(shown)} (prompt, seed) pairs "
        f"of {settings.num_frames} frames {settings.height}x{settings.width}, {settings.steps} steps, in batches of "
        f"{config.model.batch}",
        flush=True,
    )
    if config.dry_run:
        kind.plan(config, device, config_yaml)
        return None
    hush_libraries()
    result, fresh = _finished(config, folder, config_yaml, device, model_folder, kind)
    if config.eval.dimensions and config.mode == "quantize":
        result, fresh = _judged(config, folder, device), True
    if fresh:
        mirror(config.tracker, folder, dataclasses.asdict(config), result)
    return result


def _finished(
    config: PTQConfig, folder: Path, config_yaml: str, device: torch.device, model_folder: Path, kind: type[Job]
) -> tuple[dict[str, Any], bool]:
    """The run's result, and whether it was not known already."""
    pairs_, calibration_pairs = pairs(config.prompts), pairs(config.calib, "calib")
    # A process whose launcher was killed may still be at it.
    with in_use(Path(config.cache), folder), one_card(device) as card:
        with refused_leave_no_result(folder):
            job = kind(config, card, model_folder, pairs_, calibration_pairs)
            known = None if config.force else job.finished(folder)
        if known is not None and known.resolve() == folder.resolve():
            result = read_result(folder)
            if all(result[group].items() >= given.items() for group, given in job.names.items()):
                print(f"finished already: {folder}{by(result)}; force=true runs it again", flush=True)
                return result, False
            known = None  # under other names: most of it is in the cache
        kept = job.evaluations(folder)
        run = Run(folder, job.name, config_yaml, job.names, keep=("evaluations",) if kept else ())
        return job.carry_out(run, known, kept), True


def _judged(config: PTQConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """By VBench too: by its scores in the cache as far as they are known."""
    try:
        with one_card(device) as card:
            return evaluate_run(folder, config.eval, Path(config.cache), card)[0]
    except (ValueError, OSError) as error:
        note_not_judged(folder, Path(config.cache), error)
        raise


@dataclass
class Job:
    """``settle`` and ``check`` before anything is loaded; then ``run``."""

    name: ClassVar[str] = "ptq"
    config: Any
    device: torch.device
    model_folder: Path
    pairs: list[Pair]
    calibration_pairs: list[Pair]

    @staticmethod
    def settle(config: Any) -> Any:
        return settle_config(config)

    @staticmethod
    def check(config: Any) -> None:
        check(config, pairs(config.prompts) + pairs(config.calib, "calib"))

    @staticmethod
    def work(config: Any) -> Work:
        return work_of(config)

    @classmethod
    def plan(cls, config: Any, device: torch.device, config_yaml: str) -> None:
        print_plan(make_plan(config, device, cls.work(config)), config_yaml, start_and_end(config))

    def __post_init__(self) -> None:
        self.run_: Any = None
        self.plan_: dict[str, Any] = {}
        self.begun = 0
        self.cache = Cache(Path(self.config.cache))
        with progress("read", count_files(self.model_folder), "file") as tick:
            self.fingerprint = fingerprint(self.model_folder, tick)
        self.shape = shape_of_whole(self.model_folder)
        self.blocks = len(self.shape.blocks)

    @property
    def names(self) -> dict[str, Any]:
        """Of what was asked for, in the form of the result."""
        config = self.config
        return {group: {"name": getattr(config, group).name} for group in ("model", "quant", "protect")}

    def signed(self, protected: list[int] | None) -> str:
        counted = identity(self.config, self.blocks, protected)
        return signature(counted, self.fingerprint, self.device)

    @property
    def asked(self) -> str:
        """The signature by which a finished run is found before anything is loaded."""
        by_rule = self.config.mode == "quantize"
        return self.signed(rule_blocks(self.config.protect, self.shape) if by_rule else None)

    def finished(self, folder: Path) -> Path | None:
        wanted: dict[str, Any] = {"fps": self.config.model.generation.fps}
        if self.with_checkpoint:
            wanted["packed"] = self.config.quant.packed
        return find_finished(self.cache, self.asked, folder, wanted)

    @property
    def with_checkpoint(self) -> bool:
        return bool(self.config.checkpoint) and self.config.mode == "quantize"

    def evaluations(self, folder: Path) -> dict[str, Any]:
        """Of an earlier result in the folder that answers the same signature: what ``eval.py`` has joined to it."""
        try:
            result = read_result(folder)
        except (ValueError, OSError):
            return {}
        found: dict[str, Any] = result.get("evaluations", {}) if result.get("asked") == self.asked else {}
        return found

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

    def planned(self) -> dict[str, Any]:
        """What it would take from the beginning, with nothing in the cache: bytes beside those there were before, and
        seconds by stage. Probed once for each cache, the machine's other work apart."""
        begun, outside = time.perf_counter(), start_and_end(self.config)
        config = self.config
        plan = make_plan(config, self.device, self.work(config))
        cells = self.cache.cells("plans", digest([self.signed(None), config.quant.packed]))
        known = cells.get("stages")
        if known is not None and known["guess"]:
            cells.put("stages", self.needed(plan))
        found: dict[str, Any] = cells.measured("stages", lambda: self.needed(plan))
        stages = {**outside, "plan": time.perf_counter() - begun, **found["stages"]}
        return {**found, "seconds": sum(stages.values()), "stages": stages}

    def needed(self, plan: Plan) -> dict[str, Any]:
        return {"bytes": plan.added, "seconds": plan.seconds, "stages": plan.stages, "guess": plan.guess}

    def load(self) -> Bench:
        config = self.config
        if self.run_ is not None:
            with self.run_.stage("plan"):
                self.plan_ = self.planned()
            guess, start = GUESS if self.plan_["guess"] else "", self.plan_["stages"]["start"]
            told = f"{in_time(self.plan_['seconds'])} in all, of which {in_time(start)} are over; what the cache holds"
            print(f"predicted: {told} takes none{guess}", flush=True)
        forget_peak_memory(self.device)
        self.begun = peak_memory(self.device)
        with self.run_.stage("load") if self.run_ is not None else nullcontext():
            self.made = provenance(self.device)
            with progress("load", LOAD_PARTS, "part") as tick:
                pipe = load_pipeline(self.model_folder, str(self.device), tick)
            plant_outliers_(whole_of(pipe), config.model.outliers)
        studio = Studio(pipe, config.model, self.fingerprint, self.device, self.cache)
        return Bench(studio, config.quant, self.calibration_pairs, config.analysis.bins, tuple(config.protect.modules))

    def analyze(self) -> dict[str, Any]:
        bench = self.load()
        with self.run_.stage("calibrate"):
            bench.calibration(full=True)
        with self.run_.stage("analyze"):
            analysis = analyze(bench, self.config.analysis, self.config.protect, self.run_.folder)
        return {**self._head(bench, None), **analysis, **self._tail(bench, self.config.calib)}

    def _head(self, bench: Bench, protected: list[int] | None) -> dict[str, Any]:
        model = self.config.model
        return {
            "signature": self.signed(protected),
            "mode": self.config.mode,
            "model": {
                "name": model.name,
                "blocks": self.blocks,
                "batch": model.batch,
                "parameters": sum(p.numel() for p in self.shape.parameters()),
                "fingerprint": self.fingerprint,
                "outliers": list(chosen_blocks(model.outliers, self.blocks)),
                "octaves": model.outliers.octaves,
            },
            "quant": dataclasses.asdict(self.config.quant),
        }

    def _tail(self, bench: Bench, prompts: PromptsConfig) -> dict[str, Any]:
        texts = list(dict.fromkeys(text for text, _ in pairs(prompts)))
        return {
            "generation": dataclasses.asdict(self.config.model.generation),
            "memory": {
                "peak_bytes": peak_memory(self.device),
                "begun_bytes": self.begun,
                "planned_bytes": self.begun + self.plan_["bytes"],
            },
            "planned": {name: self.plan_[name] for name in ("seconds", "stages", "guess")},
            "provenance": {
                **self.made,
                "bf16_products": "native" if multiplies_bf16(self.device) else "float32, rounded once",
                "from_cache": bench.studio.reused,
                "seeds": prompts.seeds,
                "prompts": texts,
                "prompt_hash": digest(texts),
            },
        }

    def run(self) -> dict[str, Any]:
        config, run = self.config, self.run_
        bench = self.load()
        studio, pipe = bench.studio, bench.studio.pipe
        with run.stage("calibrate"):
            calibration, stats = bench.calibration(), bench.inputs()
        with run.stage("choose"):
            choice = choose(config.protect, bench)
            block_sqnr = bench.block_sqnr(choice.blocks).as_json() if config.eval.block_sqnr else None
        with run.stage("generate_bf16"):
            reference = self._bf16(studio, "generate BF16", self.pairs)
        floors: dict[str, list[tuple[Sample, Sample]]] = {}
        if config.eval.noise_floor:
            with run.stage("noise_floor"):
                floors = self._floors(studio, reference)
        with run.stage("quantize"):
            report = self._quantize(bench, choice, stats)
        with run.stage("generate_quantized"):
            label, how = f"generate {config.quant.format}", bench.what_is_quantized(report.protected_blocks)
            latents, overflows = studio.latents(label, self.pairs, how, afresh=config.force)
            samples = studio.videos(label, self.pairs, latents)
        with run.stage("compare"):
            beside = {"": list(zip(reference, samples, strict=True)), **floors}
            with progress("compare", sum(map(len, beside.values())), "pair") as tick:
                lpips = distance(config.eval.lpips, self.device)
                metrics = measure(beside, config.model.language == "scenes", tick, lpips)
            gate_results = gates.check(samples, reference)
        with run.stage("write"):
            self._write_videos(reference, samples, floors)
            if config.checkpoint and report.names("converted"):
                with progress("save", len(report.names("converted")), "linear") as tick:
                    save_quantized(pipe, run.folder / "checkpoint", tick)
        return {
            **self._head(bench, list(report.protected_blocks)),
            **self._conversion(report, calibration, choice, overflows),
            "block_sqnr": block_sqnr,
            "metrics": {name: estimate(items).as_json() for name, items in metrics.items()},
            "demonstration": len(self.pairs) < ENOUGH_PAIRS,
            "verdict": "pass" if all(gate.passed for gate in gate_results) else "fail",
            "gates": {gate.name: gate.as_json() for gate in gate_results},
            **self._tail(bench, config.prompts),
        }

    def _quantize(self, bench: Bench, choice: Choice, stats: Mapping[str, float | Site]) -> ConversionReport:
        transformer, how = bench.studio.transformer, (bench.quant, choice.blocks, bench.modules)
        plan = plan_conversion(transformer, *how)
        with progress("quantize", len(plan.names("converted")), "linear") as tick:
            return quantize_(transformer, *how, stats, on_linear=tick, folds=FOLDS)

    def _bf16(self, studio: Studio, label: str, pairs_: list[Pair], how: dict[str, str] | None = None) -> list[Sample]:
        return studio.videos(label, pairs_, studio.latents(label, pairs_, how)[0])

    def _floors(self, studio: Studio, reference: list[Sample]) -> dict[str, list[tuple[Sample, Sample]]]:
        """BF16 beside itself: the initial noise moved by one unit in its last place, and another seed."""
        moved = self._bf16(studio, "noise floor: 1 ulp", self.pairs, {"moved": "1 ulp"})
        known = {(sample.prompt, sample.seed): sample for sample in reference}
        further, partners = other_seed(self.config.prompts)
        if further:
            for sample in self._bf16(studio, "noise floor: seed", further):
                known[sample.prompt, sample.seed] = sample
        other = [(s, known[s.prompt, partners[s.seed]]) for s in reference if s.seed in partners]
        return {"floor_ulp.": list(zip(reference, moved, strict=True)), "floor_seed.": other}

    def _write_videos(
        self, reference: list[Sample], samples: list[Sample], floors: Mapping[str, Sequence[tuple[Sample, Sample]]]
    ) -> None:
        folder, fps = self.run_.folder, self.config.model.generation.fps
        labels = ("BF16", self.config.quant.format)
        rows = []
        with progress("write videos", len(samples), "pair") as tick:
            for number, (a, b) in enumerate(zip(reference, samples, strict=True)):
                frames = pictures.to_uint8(a.video), pictures.to_uint8(b.video)
                name = f"{number:03d}-seed{a.seed}.mp4"
                for _, moved in floors.get("floor_ulp.", ())[number : number + 1]:
                    pictures.write_mp4(folder / "videos" / "bf16_ulp" / name, pictures.to_uint8(moved.video), fps)
                pictures.write_mp4(folder / "videos" / "bf16" / name, frames[0], fps)
                pictures.write_mp4(folder / "videos" / "quantized" / name, frames[1], fps)
                both = pictures.side_by_side(frames, labels)
                pictures.write_mp4(folder / "videos" / "side_by_side" / name, both, fps)
                rows.append(
                    (f"{a.prompt}, seed {a.seed}", (("BF16", frames[0]), (self.config.quant.format, frames[1])))
                )
                tick()
        pictures.write_png(folder / "figures" / "contact_sheet.png", pictures.contact_sheet(rows[:SHEET_ROWS]))

    def _conversion(
        self, report: ConversionReport, calibration: Calibration, choice: Choice, overflows: Counter[str]
    ) -> dict[str, Any]:
        layout = calibration.statistics.layout
        return {
            "protect": {
                "name": self.config.protect.name,
                "blocks": list(report.protected_blocks),
                "modules": list(self.config.protect.modules),
                "chosen": choice.as_json(),
                "fraction_of_flops_quantized": calibration.fraction_of_flops(report),
            },
            "conversion": report.counts(),
            "attention": {
                **report.attention_counts(),
                "modules": [dataclasses.asdict(module) for module in report.attentions],
            },
            "overflow": {
                "elements": sum(overflows.values()),
                "modules": dict(sorted(overflows.items())),
            },
            "modules": [dataclasses.asdict(module) for module in report.modules],
            "calibration": {
                "videos": len(layout.videos),
                "steps": layout.steps,
                "coverage": calibration.statistics.coverage(),
                "block_absmax": [
                    calibration.statistics.site(f"blocks.{i}", RESIDUAL).largest() for i in range(report.blocks)
                ],
                "input_absmax": calibration.statistics.input_absmax(),
            },
        }
