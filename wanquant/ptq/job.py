"""The PTQ job: what does it cost to quantize all blocks but these?

Data flows straight through: load, calibrate in BF16, generate in BF16, quantize, generate again
from the same noise, compare, save, report. Everything that can be refused is refused before the
first video; ``result.json`` is written last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate import gates
from wanquant.evaluate.compare import measure
from wanquant.evaluate.prompts import EvalConfig, PromptsConfig, pairs
from wanquant.evaluate.stats import ENOUGH_PAIRS, estimate
from wanquant.kernels import check_native
from wanquant.ptq.analyze import AnalysisConfig, analyze, check_analysis
from wanquant.ptq.bench import Bench
from wanquant.ptq.calibrate import Calibration
from wanquant.ptq.choose import Choice, choose
from wanquant.ptq.plan import print_plan
from wanquant.ptq.protect import GREEDY, MEASURES, ProtectConfig, by_rule, check_protect
from wanquant.quant import ConversionReport, QuantConfig, plan_conversion, quantize_
from wanquant.quant.config import parse, settle
from wanquant.quant.statistics import RESIDUAL, Site
from wanquant.runs import pictures
from wanquant.runs.cache import Cache
from wanquant.runs.progress import progress
from wanquant.runs.report import summary, write_report
from wanquant.runs.run import Run, digest, provenance, refused_leave_no_result, signature
from wanquant.runs.tracking import TrackerConfig, check_tracker, mirror
from wanquant.wan.checkpoint import quantization_of, quantized_linears, save_quantized
from wanquant.wan.config import ModelConfig
from wanquant.wan.device import forget_peak_memory, peak_memory, pick_device
from wanquant.wan.generate import Sample, generate
from wanquant.wan.load import (
    FOLDS,
    LOAD_PARTS,
    Pipeline,
    check_folder,
    check_shape,
    count_files,
    empty_transformer,
    find_folder,
    fingerprint,
    hush_libraries,
    load_pipeline,
)
from wanquant.wan.outliers import chosen_blocks, plant_outliers_
from wanquant.wan.products import multiplies_bf16
from wanquant.wan.tiny import parse_caption

#: Videos on the contact sheet at most.
SHEET_ROWS = 12


MODES = ("quantize", "analyze")


@dataclass
class PTQConfig:
    """The whole of ``python ptq.py``. ``mode=quantize`` says what a quantization cost, ``mode=analyze`` what passes
    through the BF16 model."""

    mode: str = "quantize"

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    calib: PromptsConfig = field(default_factory=PromptsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    #: Save the packed checkpoint.
    checkpoint: bool = True
    #: Print the plan and do nothing else.
    dry_run: bool = False
    #: Where what several runs share is kept: calibration statistics, BF16 latents, sensitivities.
    cache: str = "outputs/cache"


def run_ptq(config: PTQConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """Runs the job in ``folder`` and returns the result as written, or None after a dry run.

    ``ValueError`` and ``OSError`` are the user's; whatever else goes wrong, ``result.json`` says failed.
    """
    with refused_leave_no_result(folder) if not config.dry_run else nullcontext():
        config = _settle(config)
        pairs_, calibration_pairs = pairs(config.prompts), pairs(config.calib, "calib")
        device = pick_device(config.model.device)
        _check(config, pairs_ + calibration_pairs)
        if not config.dry_run:
            if config.quant.product == "native":
                check_native(device)
            model_folder = find_folder(config.model.path)
            check_folder(model_folder)
    settings = config.model.generation
    shown = calibration_pairs if config.mode == "analyze" else pairs_
    print(
        f"{config.quant.name} on {config.model.name} ({device.type}, {torch.get_num_threads()} threads), protect "
        f"{config.protect.name}: {len(shown)} (prompt, seed) pairs of {settings.num_frames} frames "
        f"{settings.height}x{settings.width}, {settings.steps} steps, in batches of {config.model.batch}",
        flush=True,
    )
    if config.dry_run:
        shape = find_folder(config.model.path, shapes_only=True)
        floors = len(pairs_) + len(_other_seed(config.prompts)[0]) if config.eval.noise_floor else 0
        videos = len(calibration_pairs) + 2 * len(pairs_) + floors
        if config.protect.by in (*MEASURES, GREEDY):
            raise ValueError(f"dry_run=true cannot know the blocks that protect.by={config.protect.by} would choose")
        blocks = by_rule(config.protect, len(empty_transformer(shape).blocks))
        protect = dataclasses.replace(config.protect, blocks=blocks)
        print_plan(config_yaml, shape, config.quant, protect, settings, videos)
        return None
    hush_libraries()
    run = Run(folder, "ptq", config_yaml)
    try:
        job = _Job(config, run, device, model_folder, pairs_, calibration_pairs)
        result = job.analyze() if config.mode == "analyze" else job.run()
        full = run.finish(result, lambda complete: write_report(folder, complete))
    except BaseException as error:
        run.fail(error)
        raise
    mirror(config.tracker, folder, dataclasses.asdict(config), full)
    print(summary(full, folder))
    return full


def _check(config: PTQConfig, videos: list[tuple[str, int]]) -> None:
    """Refuses what can be refused by the config and the model's shape, before a weight is read or fetched."""
    scheme = parse(config.quant)
    check_tracker(config.tracker)
    if config.mode not in MODES:
        raise ValueError(f"mode={config.mode}: choose {' or '.join(MODES)}")
    if config.analysis.bins < 1:
        raise ValueError(f"analysis.bins={config.analysis.bins}: must be at least 1")
    if config.mode == "analyze":
        if config.dry_run:
            raise ValueError("dry_run=true plans a quantization: leave mode=analyze out")
        check_analysis(config.analysis, config.model.generation.steps)
        if scheme.format.name != "hif8":
            raise ValueError(f"mode=analyze looks at HiF8, not at {scheme.format.name}: leave quant.format as it is")
    if config.model.batch < 1:
        raise ValueError(f"model.batch={config.model.batch}: must be at least 1")
    if config.model.language == "scenes":
        for prompt, _ in videos:
            parse_caption(prompt)
    folder = find_folder(config.model.path, shapes_only=True)
    check_shape(folder)
    if quantization_of(folder / "transformer") is not None:
        raise ValueError(f"{folder} is quantized already: model.path must be the original model")
    if (folder / "transformer_2").is_dir():
        raise ValueError(f"{folder} has two transformers (Wan2.2), of which this version would quantize only one")
    shape = empty_transformer(folder)
    check_protect(config.protect, len(shape.blocks))
    chosen_blocks(config.model.outliers, len(shape.blocks))
    by_data = config.protect.by in (*MEASURES, GREEDY)
    kept = list(range(config.protect.budget)) if by_data else by_rule(config.protect, len(shape.blocks))
    plan = plan_conversion(shape, config.quant, kept, config.protect.modules)
    if by_data and scheme.format.keeps_all:
        raise ValueError(f"protect.by={config.protect.by} measures a quantization, and {scheme.format.name} is none")
    if not plan.names("converted") and not scheme.format.keeps_all:
        raise ValueError("protect leaves no linear to quantize: protect fewer blocks or modules")


def _settle(config: PTQConfig) -> PTQConfig:
    """The config with the format's own choices, and videos one at a time where a batch would share a step: the videos
    of a real run come alone."""
    quant = settle(config.quant)
    alone = config.model.batch > 1 and not parse(quant).independent
    model = dataclasses.replace(config.model, batch=1) if alone else config.model
    return dataclasses.replace(config, quant=quant, model=model)


@dataclass
class _Job:
    config: PTQConfig
    run_: Run
    device: torch.device
    model_folder: Path
    pairs: list[tuple[str, int]]
    calibration_pairs: list[tuple[str, int]]

    def load(self) -> Bench:
        config = self.config
        forget_peak_memory(self.device)
        with self.run_.stage("load"):
            self.made = provenance(self.device)
            with progress("read", count_files(self.model_folder), "file") as tick:
                mark = fingerprint(self.model_folder, tick)
            with progress("load", LOAD_PARTS, "part") as tick:
                pipe = load_pipeline(self.model_folder, config.model.device, tick)
            plant_outliers_(pipe.transformer, config.model.outliers)
        bins = min(config.analysis.bins, config.model.generation.steps)
        known = (self.calibration_pairs, mark, self.device, Cache(Path(config.cache)), bins)
        return Bench(pipe, config.model, config.quant, *known, modules=tuple(config.protect.modules))

    def analyze(self) -> dict[str, Any]:
        bench = self.load()
        with self.run_.stage("calibrate"):
            bench.calibration(full=True)
        with self.run_.stage("analyze"):
            analysis = analyze(bench, self.config.analysis, self.config.protect, self.run_.folder)
        return {**self._head(bench, self.config), **analysis, **self._tail(bench, self.config.calib)}

    def _head(self, bench: Bench, settled: PTQConfig) -> dict[str, Any]:
        return {
            "signature": signature(dataclasses.asdict(settled), bench.fingerprint, self.device),
            "mode": self.config.mode,
            "model": {
                "name": self.config.model.name,
                "blocks": bench.blocks,
                "batch": self.config.model.batch,
                "parameters": sum(p.numel() for p in bench.pipe.transformer.parameters()),
                "fingerprint": bench.fingerprint,
                "outliers": list(chosen_blocks(self.config.model.outliers, bench.blocks)),
                "octaves": self.config.model.outliers.octaves,
            },
            "quant": dataclasses.asdict(self.config.quant),
        }

    def _tail(self, bench: Bench, prompts: PromptsConfig) -> dict[str, Any]:
        return {
            "generation": dataclasses.asdict(self.config.model.generation),
            "memory": {"peak_bytes": peak_memory(self.device)},
            "provenance": {
                **self.made,
                "bf16_products": "native" if multiplies_bf16(self.device) else "float32, rounded once",
                "from_cache": bench.reused,
                "seeds": prompts.seeds,
                "prompts": prompts.texts,
                "prompt_hash": digest(prompts.texts),
            },
        }

    def run(self) -> dict[str, Any]:
        config, run = self.config, self.run_
        bench = self.load()
        pipe = bench.pipe
        with run.stage("calibrate"):
            calibration, stats = bench.calibration(), bench.inputs()
        with run.stage("choose"):
            choice = choose(config.protect, bench)
        with run.stage("generate_bf16"):
            reference = bench.baseline("generate BF16", self.pairs)
        floors: dict[str, list[tuple[Sample, Sample]]] = {}
        if config.eval.noise_floor:
            with run.stage("noise_floor"):
                floors = self._floors(bench, reference)
        with run.stage("quantize"):
            report = self._quantize(pipe, choice, stats)
        with run.stage("generate_quantized"):
            settings, batch = config.model.generation, config.model.batch
            with progress(f"generate {config.quant.format}", -(-len(self.pairs) // batch) * settings.steps) as tick:
                samples = generate(pipe, self.pairs, settings, tick, batch=batch)
        with run.stage("compare"):
            beside = {"": list(zip(reference, samples, strict=True)), **floors}
            with progress("compare", sum(map(len, beside.values())), "pair") as tick:
                metrics = measure(beside, scenes=config.model.language == "scenes", on_pair=tick)
            gate_results = gates.check(samples, reference)
        with run.stage("write"):
            self._write_videos(reference, samples)
            if config.checkpoint and report.names("converted"):
                with progress("save", len(report.names("converted")), "linear") as tick:
                    save_quantized(pipe, run.folder / "checkpoint", tick)
        # How the blocks were chosen changes nothing but which they are.
        protect = ProtectConfig(config.protect.name, list(report.protected_blocks), config.protect.modules)
        model = dataclasses.replace(config.model, batch=min(config.model.batch, len(self.pairs)))
        settled = dataclasses.replace(config, model=model, protect=protect, analysis=AnalysisConfig())
        return {
            **self._head(bench, settled),
            **self._conversion(pipe, report, calibration, choice),
            "metrics": {name: estimate(items).as_json() for name, items in metrics.items()},
            "demonstration": len(self.pairs) < ENOUGH_PAIRS,
            "verdict": "pass" if all(gate.passed for gate in gate_results) else "fail",
            "gates": {gate.name: gate.as_json() for gate in gate_results},
            **self._tail(bench, config.prompts),
        }

    def _quantize(self, pipe: Pipeline, choice: Choice, stats: Mapping[str, float | Site]) -> ConversionReport:
        how = (self.config.quant, choice.blocks, self.config.protect.modules)
        plan = plan_conversion(pipe.transformer, *how)
        with progress("quantize", len(plan.names("converted")), "linear") as tick:
            return quantize_(pipe.transformer, *how, stats, on_linear=tick, folds=FOLDS)

    def _floors(self, bench: Bench, reference: list[Sample]) -> dict[str, list[tuple[Sample, Sample]]]:
        """BF16 beside itself: the initial noise moved by one unit in its last place, and another seed."""
        moved = bench.baseline("noise floor: 1 ulp", self.pairs, moved=True)
        known = {(sample.prompt, sample.seed): sample for sample in reference}
        further, following = _other_seed(self.config.prompts)
        if further:
            for sample in bench.baseline("noise floor: seed", further):
                known[sample.prompt, sample.seed] = sample
        other = [(s, known[s.prompt, following[s.seed]]) for s in reference if s.seed in following]
        return {"floor_ulp.": list(zip(reference, moved, strict=True)), "floor_seed.": other}

    def _write_videos(self, reference: list[Sample], samples: list[Sample]) -> None:
        folder, fps = self.run_.folder, self.config.model.generation.fps
        labels = ("BF16", self.config.quant.format)
        rows = []
        with progress("write videos", len(samples), "pair") as tick:
            for number, (a, b) in enumerate(zip(reference, samples, strict=True)):
                frames = pictures.to_uint8(a.video), pictures.to_uint8(b.video)
                name = f"{number:03d}-seed{a.seed}.mp4"
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
        self, pipe: Pipeline, report: ConversionReport, calibration: Calibration, choice: Choice
    ) -> dict[str, Any]:
        layout = calibration.statistics.layout
        overflowed = {name: int(layer.overflowed) for name, layer in quantized_linears(pipe.transformer).items()}
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
                "elements": sum(overflowed.values()),
                "modules": {name: count for name, count in overflowed.items() if count},
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


def _other_seed(prompts: PromptsConfig) -> tuple[list[tuple[str, int]], dict[int, int]]:
    """The videos to generate besides, and with which other seed each seed is compared.

    A single seed gets a further one; of two, each prompt's pair counts once.
    """
    seeds = prompts.seeds
    if len(seeds) == 1:
        return [(text, seeds[0] + 1) for text in prompts.texts], {seeds[0]: seeds[0] + 1}
    following = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    if len(seeds) == 2:
        del following[seeds[1]]
    return [], following
