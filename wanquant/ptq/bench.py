"""A loaded model and what has been measured on it, each measurement made once and shared by signature.

Everything here is BF16 or leaves the model as it was: the transformer is quantized for good by the job alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from wanquant.evaluate.stats import Estimate, Item, estimate
from wanquant.ptq import sensitivity
from wanquant.ptq.calibrate import Calibration, Pair, calibrate, linear_flops
from wanquant.quant import QuantConfig
from wanquant.quant.config import Scheme, parse
from wanquant.quant.statistics import Site
from wanquant.quant.statistics_file import KIND, load_statistics, save_statistics
from wanquant.runs.cache import Cache
from wanquant.runs.progress import progress
from wanquant.runs.run import signature
from wanquant.wan.config import ModelConfig
from wanquant.wan.generate import Sample, decode_video, generate, one_ulp_up
from wanquant.wan.load import Pipeline

#: What of generation changes no latent.
NOT_COUNTED = ("fps",)


@dataclass
class Bench:
    """``pairs`` are the calibration prompts; ``bins`` those of denoising steps; ``modules`` patterns of what stays BF16
    in every block."""

    pipe: Pipeline
    model: ModelConfig
    quant: QuantConfig
    pairs: list[Pair]
    fingerprint: str
    device: torch.device
    cache: Cache
    bins: int = 4
    modules: tuple[str, ...] = ()
    #: What was not made by this run but found in the cache.
    reused: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _calibrations: dict[bool, Calibration] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.pipe.transformer.blocks)

    def _signature(self, kind: str, **more: Any) -> str:
        generation = {k: v for k, v in dataclasses.asdict(self.model.generation).items() if k not in NOT_COUNTED}
        counted = {"artefact": kind, "generation": generation, "outliers": dataclasses.asdict(self.model.outliers)}
        return signature({**counted, "pairs": self.pairs, **more}, self.fingerprint, self.device)

    def _together(self, pairs: list[Pair]) -> int:
        """The videos of a full batch, of which there may be fewer than allowed."""
        return min(self.model.batch, len(pairs))

    @property
    def scheme(self) -> Scheme:
        return parse(self.quant)

    def calibration(self, full: bool | None = None) -> Calibration:
        """Statistics of one BF16 pass; ``full`` unless told otherwise where the quantization needs it."""
        full = self.scheme.needs_statistics if full is None else full
        # The full ones hold all that the light ones do.
        full = full or self.cache.has("statistics", self._statistics_signature(full=True))
        if full not in self._calibrations:
            statistics = load_statistics(self._statistics_folder(full))
            self._calibrations[full] = Calibration(statistics, linear_flops(self.pipe, statistics.rows()))
        return self._calibrations[full]

    def statistics_files(self, full: bool) -> list[Path]:
        return sorted(self._statistics_folder(full).iterdir())

    def _statistics_folder(self, full: bool) -> Path:
        settings = self.model.generation

        def make(folder: Path) -> None:
            with progress("calibrate", len(self.pairs) * settings.steps) as tick:
                made = calibrate(self.pipe, self.pairs, settings, tick, self.bins, full)
            about = {"model": self.model.name, "fingerprint": self.fingerprint}
            save_statistics(made.statistics, folder, about)

        return self._artefact("calibrate", "statistics", self._statistics_signature(full), make)

    def _artefact(self, label: str, kind: str, signature: str, make: Callable[[Path], None]) -> Path:
        """From the cache, which is said, or made now."""
        if self.cache.has(kind, signature) and signature not in self._seen:
            self.reused.append(label)
            print(f"{label:<20} known, from {self.cache.root}", file=sys.stderr, flush=True)
        self._seen.add(signature)
        return self.cache.folder(kind, signature, make)

    def _statistics_signature(self, full: bool) -> str:
        return self._signature("statistics", bins=self.bins, full=full, files=KIND)

    def inputs(self) -> dict[str, float | Site]:
        """What ``quantize_`` is to know of each linear's input."""
        calibration = self.calibration()
        if not calibration.statistics.layout.full:
            return dict(calibration.statistics.input_absmax())
        names = calibration.flops
        return {name: calibration.statistics.site(name, "input") for name in names}

    @cached_property
    def references(self) -> list[torch.Tensor]:
        """Final BF16 latents of the calibration pairs."""
        return self._latents("reference BF16", self.pairs)

    def baseline(self, label: str, pairs: list[Pair], moved: bool = False) -> list[Sample]:
        """BF16 videos; ``moved``: from noise that is one unit in its last place higher."""
        latents = self._latents(label, pairs, moved)
        with progress(f"decode ({label})", len(pairs), "video") as tick:
            samples = []
            for pair, final in zip(pairs, latents, strict=True):
                samples.append(Sample(*pair, final, decode_video(self.pipe, final)))
                tick()
        return samples

    def _latents(self, label: str, pairs: list[Pair], moved: bool = False) -> list[torch.Tensor]:
        """Final BF16 latents of every pair: what a video is kept as, being fifty times smaller. Generated in the
        batches in which they will be compared."""

        def make(folder: Path) -> None:
            settings, batch, perturb = self.model.generation, self.model.batch, one_ulp_up if moved else None
            with self._steps(label, pairs) as tick:
                samples = generate(self.pipe, pairs, settings, tick, perturb, decode=False, batch=batch)
            save_file({str(i): sample.latents for i, sample in enumerate(samples)}, folder / "latents.safetensors")

        counted = {"pairs": pairs, "batch": self._together(pairs), **({"moved": "1 ulp"} if moved else {})}
        folder = self._artefact(label, "latents", self._signature("latents", **counted), make)
        latents = load_file(folder / "latents.safetensors")
        return [latents[str(i)] for i in range(len(pairs))]

    @contextmanager
    def _steps(self, label: str, pairs: list[Pair], times: int = 1) -> Iterator[Callable[[], None]]:
        """Progress over the denoising steps of the pairs' batches, so many times."""
        with progress(label, times * -(-len(pairs) // self.model.batch) * self.model.generation.steps) as tick:
            yield tick

    def block_errors(self) -> list[Estimate]:
        """SQNR of each block's own output, quantized alone; the cheap measure."""
        cells = self.cache.cells("block_errors", self._quantized("block_errors"))
        known = cells.get("blocks")
        if known is None:
            stats, how = self.inputs(), (self.model.generation, self.model.batch)
            with self._steps("block errors", self.pairs) as tick:
                rows = sensitivity.block_errors(self.pipe, self.quant, self.modules, self.pairs, *how, stats, tick)
            known = [[vars(item) for item in row] for row in rows]
            cells.put("blocks", known)
        return [estimate([Item(**item) for item in row]) for row in known]

    def _quantized(self, kind: str, **more: Any) -> str:
        quant = {k: v for k, v in dataclasses.asdict(self.quant).items() if k not in ("name", "packed")}
        counted = {"quant": quant, "batch": self._together(self.pairs), "modules": self.modules}
        return self._signature(kind, **counted, **more)

    def unit_errors(self, units: Sequence[str]) -> dict[str, Estimate]:
        """SQNR of the final latents with nothing quantized but the unit; the expensive measure, cell by cell."""
        protected = {unit: sensitivity.all_but(self.pipe.transformer, unit, self.modules) for unit in units}
        return self._cells("sensitivity", protected)

    def protected_errors(self, sets: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Estimate]:
        """SQNR of the final latents with everything quantized but the blocks of each set."""
        names = {"protect " + (" ".join(map(str, blocks)) or "none"): blocks for blocks in sets}
        found = self._cells("sensitivity", {name: (list(blocks), list(self.modules)) for name, blocks in names.items()})
        return {names[name]: value for name, value in found.items()}

    def _cells(self, kind: str, todo: dict[str, tuple[list[int], list[str]]]) -> dict[str, Estimate]:
        cells = self.cache.cells(kind, self._quantized(kind))
        missing = [name for name in todo if cells.get(name) is None]
        stats = self.inputs() if missing else {}
        if missing:
            self.references  # noqa: B018  made before the progress of the cells begins
        found = {}
        with self._steps(kind, self.pairs, len(missing)) as tick:
            for name, protected in todo.items():

                def measure(protected: tuple[list[int], list[str]] = protected) -> list[Item]:
                    return self._final_errors(*protected, stats, tick)

                found[name] = estimate(sensitivity.measured(cells, name, measure))
        return found

    def _final_errors(
        self, blocks: list[int], modules: list[str], stats: sensitivity.Stats, tick: Callable[[], None]
    ) -> list[Item]:
        how = (self.model.generation, self.model.batch)
        with sensitivity.quantized(self.pipe.transformer, self.quant, blocks, modules, stats):
            return sensitivity.final_errors(self.pipe, self.pairs, self.references, *how, tick)
