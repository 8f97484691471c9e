"""Calibration and what is measured with its prompts on a loaded BF16 model, each measurement made once and kept in the
cache by its signature.

Everything here is BF16 or leaves the model as it was: the transformer is quantized for good by the job alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanquant.evaluate.fidelity import EQUAL_DB
from wanquant.evaluate.single_steps import Trajectories, measured_now, record
from wanquant.evaluate.stats import Estimate, Item, estimate
from wanquant.ptq import sensitivity
from wanquant.quant import ConversionReport, plan_conversion
from wanquant.quant.feedback import HessianObserver, StoredHessians
from wanquant.quant.scheme import Scheme
from wanquant.quant.select import resolve_blocks
from wanquant.quant.statistics import KIND, Layout, Observer, Site, Statistics, load_statistics, merge, save_statistics
from wanquant.runs import launch
from wanquant.runs.cache import locked
from wanquant.runs.progress import progress
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.experts import transformers_in
from wanquant.wan.generate import Position


@dataclass(frozen=True)
class Calibration:
    """Calibration statistics, and the multiply-adds of each linear over the calibration tokens."""

    statistics: Statistics
    flops: dict[str, int]

    def fraction_of_flops(self, report: ConversionReport) -> float:
        """Share of the multiply-adds of all linears that the converted ones do."""
        return sum(self.flops[name] for name in report.names("converted")) / sum(self.flops.values())


@dataclass
class Calibrator:
    """``pairs`` are the calibration prompts; ``bins`` those of denoising steps; ``modules`` patterns of what stays BF16
    in every block; of each trajectory so many ``single_steps`` are recorded."""

    pipeline: CachedPipeline
    scheme: Scheme
    pairs: list[Pair]
    bins: int = 4
    modules: tuple[str, ...] = ()
    single_steps: int = 10
    #: Of how many blocks there is memory for the Hessians at a time.
    hessian_blocks: int = 1
    _calibrations: dict[bool, Calibration] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.pipeline.transformer.blocks)

    @property
    def transformers(self) -> int:
        """Two of Wan2.2, each with as many of the blocks."""
        return len(transformers_in(self.pipeline.pipe))

    def calibration(self, full: bool | None = None) -> Calibration:
        """Statistics of one BF16 pass; ``full`` unless told otherwise where the quantization needs it."""
        full = self.scheme.needs_statistics if full is None else full
        # The full ones hold all that the light ones do.
        full = full or self.pipeline.cache.has("statistics", self._statistics_signature(full=True))
        if full not in self._calibrations:
            statistics = load_statistics(self._statistics_folder(full))
            self._calibrations[full] = Calibration(statistics, self._flops(statistics.rows()))
        return self._calibrations[full]

    def _flops(self, rows: dict[str, int]) -> dict[str, int]:
        """Multiplications and additions of each linear for the rows it was given."""
        flops, transformer = {}, self.pipeline.transformer
        for name, count in rows.items():
            linear = transformer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            flops[name] = 2 * count * linear.in_features * linear.out_features
        return flops

    def statistics_files(self, full: bool) -> list[Path]:
        return sorted(self._statistics_folder(full).iterdir())

    def _statistics_folder(self, full: bool) -> Path:
        """Made video by video, so a killed calibration goes on, and processes share it: parts merge to what one pass
        finds, bit for bit."""
        pipeline, signed = self.pipeline, self._statistics_signature(full)
        cache, whole = pipeline.cache, pipeline.cache.has("statistics", signed)
        names = [] if whole else [f"{signed}-{place:03d}" for place in range(len(self.pairs))]
        missing = sum(not cache.has("statistics", name) for name in names)
        steps = missing * pipeline.model.generation.steps
        with progress("calibrate", steps) if missing else nullcontext(lambda: None) as tick:
            observers = dict(zip(names, (self._observer(pair, full, tick) for pair in self.pairs), strict=False))
            for name, observe in observers.items():
                if not cache.has("statistics", signed):  # else another process is through with all of them
                    cache.offer("statistics", name, observe)

            def make(folder: Path) -> None:
                parts = [cache.folder("statistics", name, observe) for name, observe in observers.items()]
                about = {"model": pipeline.model.name, "fingerprint": pipeline.fingerprint}
                save_statistics(merge([load_statistics(part) for part in parts]), folder, about)

            folder = pipeline.artefact("calibrate", "statistics", signed, make)
        pipeline.cache.forget_parts("statistics", signed)
        return folder

    def _observer(self, pair: Pair, full: bool, tick: Callable[[], None]) -> Callable[[Path], None]:
        """Denoises one calibration video in BF16 with observers on. Both guidance branches and all steps are seen; the
        VAE is not run."""

        def make(folder: Path) -> None:
            settings, position = self.pipeline.model.generation, Position()
            video = f"{pair[1]} {pair[0]}"
            layout = Layout((video,), settings.steps, self.bins, settings.passes, full)
            with Observer(self.pipeline.transformer, layout, position.where) as observer:
                self.pipeline.generate([pair], tick, decode=False, position=position)
            save_statistics(observer.statistics, folder)

        return make

    def _statistics_signature(self, full: bool) -> str:
        return self._signature("statistics", bins=self.bins, full=full, files=KIND)

    def inputs(self) -> dict[str, float | Site]:
        """What ``quantize_`` is to know of each linear's input."""
        calibration = self.calibration()
        if not calibration.statistics.layout.full and self.scheme.act_steps == 1:
            return dict(calibration.statistics.input_absmax())
        return {name: calibration.statistics.site(name, "input") for name in calibration.flops}

    def hessians(self) -> Mapping[str, torch.Tensor]:
        """What error feedback is to know of each linear's input, read when it is asked for; nothing where none asks.
        Kept by block, and made of as many at a time as there is memory for, each time in a BF16 pass over all videos
        in their order, so that the sums do not depend on how many."""
        if not self.scheme.feedback:
            return {}
        cache, linears = self.pipeline.cache, dict[int, list[str]]()
        for row in plan_conversion(self.pipeline.transformer, self.scheme, (), self.modules).modules:
            if row.status == "converted" and row.block is not None:
                linears.setdefault(row.block, []).append(row.name)
        names = {block: f"{self._signature('hessians', linears=own)}-{block:03d}" for block, own in linears.items()}
        made = False
        with locked(cache.root / "hessians" / "making.lock", "hessians"):
            while missing := [block for block in names if not cache.has("hessians", names[block])]:
                group, made = missing[: self.hessian_blocks], True
                self._make_hessians({names[block]: linears[block] for block in group})
        self.pipeline.note("hessians", known=not made)
        return StoredHessians([cache.root / "hessians" / name for name in names.values()])

    def _make_hessians(self, linears: Mapping[str, Sequence[str]]) -> None:
        """Of these linears, by the names of what is kept."""
        steps = len(self.pairs) * self.pipeline.model.generation.steps
        all_of_them = [*itertools.chain(*linears.values())]
        with progress("hessians", steps) as tick, HessianObserver(self.pipeline.transformer, all_of_them) as observer:
            for pair in self.pairs:  # alone: a batch would sum in another order
                self.pipeline.generate([pair], tick, decode=False)
        for name, own in linears.items():
            self.pipeline.cache.folder("hessians", name, partial(observer.save, own))

    @cached_property
    def trajectories(self) -> Trajectories:
        """Of BF16, of the calibration pairs."""
        return record(self.pipeline, self.pairs, self.single_steps, "record calibration", alone=True)[0]

    def block_errors(self) -> list[Estimate]:
        """SQNR of each block's own output, quantized alone; the cheap measure."""
        pipeline, cells = self.pipeline, self.pipeline.cache.cells("block_errors", self._quantized("block_errors"))
        groups = {f"batch {place}": group for place, group in enumerate(pipeline.grouped(self.pairs))}

        def measure(names: list[str]) -> list[list[list[dict[str, Any]]]]:
            known = self.inputs(), self.hessians()
            pairs = [pair for name in names for pair in groups[name]]
            with pipeline.progress("block errors", pairs) as tick:
                how = (self.scheme, self.modules, pairs, pipeline.generate, known, tick)
                together = pipeline.model.generation.together
                rows = [iter(row) for row in sensitivity.block_errors(pipeline.pipe, *how, together)]
            return [[[vars(next(row)) for _ in groups[name]] for row in rows] for name in names]

        # Together as many as may be, since the quantized copies are made anew each time.
        share = math.ceil(len(groups) / launch.processes())
        found = cells.shared(list(groups), measure, itertools.repeat(share)).values()
        rows = ([item for batch in found for item in batch[block]] for block in range(self.blocks))
        return [estimate([Item(**item) for item in row]) for row in rows]

    def block_sqnr(self, protected: Sequence[int]) -> Estimate:
        """The cheapest measure of a protection: the noise that the unprotected blocks add to their own outputs, each
        quantized alone, against these outputs, summed over blocks, in dB."""
        kept = resolve_blocks(protected, self.blocks)
        rows = [row.items for index, row in enumerate(self.block_errors()) if index not in kept]
        items = []
        for place, pair in enumerate(self.pairs):
            noise = sum(10 ** (-row[place].value / 10) for row in rows)
            items.append(Item(*pair, -10 * math.log10(noise) if rows else EQUAL_DB))
        return estimate(items)

    def _signature(self, kind: str, **more: Any) -> str:
        return self.pipeline.signature(kind, pairs=self.pairs, **more)

    def _quantized(self, kind: str, **more: Any) -> str:
        together = min(self.pipeline.model.batch, len(self.pairs))
        return self._signature(kind, quant=self._counted(), batch=together, modules=self.modules, **more)

    def _counted(self) -> dict[str, Any]:
        """Of the quantization, what changes numbers."""
        return {k: v for k, v in dataclasses.asdict(self.scheme.config).items() if k not in ("name", "packed")}

    def what_is_quantized(self, blocks: Sequence[int]) -> dict[str, Any]:
        """What makes the latents of the model quantized but for these blocks others than those in BF16."""
        calibrated = {"calib": self.pairs, "bins": self.bins}
        return {"quant": self._counted(), "protect": list(blocks), "modules": self.modules, **calibrated}

    def unit_errors(self, units: Sequence[str]) -> dict[str, Estimate]:
        """SQNR of single steps with nothing quantized but the unit; the expensive measure, cell by cell."""
        transformer = self.pipeline.transformer
        return self._step_errors({unit: sensitivity.all_but(transformer, unit, self.modules) for unit in units})

    def protected_errors(self, sets: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Estimate]:
        """SQNR of single steps with everything quantized but the blocks of each set."""
        names = {"protect " + (" ".join(map(str, blocks)) or "none"): blocks for blocks in sets}
        found = self._step_errors({name: (list(blocks), list(self.modules)) for name, blocks in names.items()})
        return {names[name]: value for name, value in found.items()}

    def _step_errors(self, protections: dict[str, tuple[list[int], list[str]]]) -> dict[str, Estimate]:
        """By name of a protection (blocks, patterns of modules), from the cache as far as they are there."""
        pipeline = self.pipeline
        cells = pipeline.cache.cells("sensitivity", self._quantized("sensitivity", kept=self.single_steps))
        missing = [name for name in protections if cells.get(name) is None]
        known: sensitivity.Known = (self.inputs(), self.hessians()) if missing else ({}, {})
        steps = self.trajectories.recording.passes if missing else 0  # recorded before the progress begins
        with progress("sensitivity", len(missing) * steps) if missing else nullcontext(lambda: None) as tick:

            def measure(names: list[str]) -> list[list[dict[str, Any]]]:
                with sensitivity.quantized(pipeline.transformer, self.scheme, *protections[names[0]], *known):
                    return [[vars(item) for item in measured_now(self.trajectories, tick).items()]]

            found = cells.shared(list(protections), measure, itertools.repeat(1))
        return {name: estimate([Item(**item) for item in items]) for name, items in found.items()}
