"""What is measured on lists of (prompt, seed) pairs: of a judged model, of BF16 beside it where there is one, and of
BF16 with its noise perturbed by one unit in the last place, the noise floor.

Videos that are not there are generated. What was measured on a pair is kept in the cache, for who goes on with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate import gates
from wanquant.evaluate.compare import REGISTERED, Networks, distances, of_pair, with_differences
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges import flow, perceptual, vbench
from wanquant.evaluate.judges.judging import Scores, judge
from wanquant.evaluate.stats import ENOUGH_PAIRS, Item, compared, estimate
from wanquant.runs import launch, pictures
from wanquant.runs.cache import Cache, Cells
from wanquant.runs.progress import progress
from wanquant.runs.run import clean_json, digest
from wanquant.runs.signature import provenance, signature
from wanquant.wan.cached import CachedPipeline, Pair, load_latents
from wanquant.wan.checkpoints.find import check_folder
from wanquant.wan.checkpoints.model_files import ModelFiles, count_files, fingerprint
from wanquant.wan.config import ModelConfig, Picture
from wanquant.wan.experts import whole_of
from wanquant.wan.generate import Sample, decode_video
from wanquant.wan.load import LOAD_PARTS, Pipeline, load_pipeline
from wanquant.wan.lora import add_loras_, describe_loras
from wanquant.wan.outliers import plant_outliers_
from wanquant.wan.resources.placement import Placement

#: Pairs of which a film of both sides is written for the report.
FILMS = 8
#: Of one pair: its ``metrics``, and the ``figures`` of the gates.
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Side:
    """One of the models: its files, how to ask it for a video, ``how`` its noise is changed, the videos that are there,
    pictures by prompt. ``fingerprint`` is what the source has to be, if known; ``verify``: so do its ``SHA256SUMS``."""

    name: str
    prefix: str
    source: ModelFiles
    model: ModelConfig
    files: dict[Pair, Path] = field(default_factory=dict)
    fingerprint: str = ""
    how: dict[str, str] = field(default_factory=dict)
    verify: bool = True
    pictures: dict[str, Picture] = field(default_factory=dict)

    def identified(self) -> Side:
        """With its fingerprint, of all the source's files. ``ValueError`` unless it is there, and what it has to be."""
        if not self.source.folder.is_dir():
            raise ValueError(f"{self.source} is not there to generate from: run ptq.py with checkpoint=true")
        check_folder(self.source)
        with progress(f"read {self.name}", count_files(self.source), "file") as tick:
            found = fingerprint(self.source, tick, describe_loras(self.model), self.verify)
        if self.fingerprint not in ("", found):
            raise ValueError(f"{self.source} is not the model this run was made with: give that as reference=<folder>")
        return dataclasses.replace(self, fingerprint=found)

    def pipeline(self, placement: Placement, cache: Cache) -> CachedPipeline:
        with progress(f"load {self.name}", LOAD_PARTS, "part") as tick:
            pipe = load_pipeline(self.source, on_part=tick, placement=placement, verify=False)  # it is identified
        add_loras_(whole_of(pipe), self.model)
        plant_outliers_(whole_of(pipe), self.model.outliers)
        return CachedPipeline(pipe, self.model, self.fingerprint, placement.device, cache, self.pictures)

    def perturbed(self, files: dict[Pair, Path]) -> Side:
        """BF16 with its initial noise changed by one unit in the last place: the noise floor."""
        return dataclasses.replace(self, name="bf16_ulp", prefix="floor_ulp.", files=files, how={"perturbed": "1 ulp"})


@dataclass(frozen=True)
class EvaluationPlan:
    """A model, and the pairs it is measured on.

    name      of the prompts
    folder    its last part is the key in ``evaluations``; videos that are generated go there, by side
    sides     the judged model; BF16, where there is a reference; BF16 with its noise perturbed, where that is wanted
    lists     pairs as they are generated, in batches along each list
    official  files are named as VBench's standard names them
    known     what a run has measured of a pair already
    """

    name: str
    folder: Path
    sides: tuple[Side, ...]
    lists: tuple[list[Pair], ...]
    config: EvalConfig
    official: bool = False
    known: dict[Pair, Values] = field(default_factory=dict)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.lists for pair in pairs]

    def identified(self) -> EvaluationPlan:
        """With the fingerprints of all sides."""
        return dataclasses.replace(self, sides=tuple(side.identified() for side in self.sides))

    def file(self, side: Side, pair: Pair) -> Path:
        """The video: one that is there already, or where it goes."""
        there = side.files.get(pair)
        return there if there is not None and there.is_file() else self.folder / side.name / self.named(pair)

    def is_there(self, pair: Pair) -> bool:
        """Whether all sides have its video."""
        return all(self.file(side, pair).is_file() for side in self.sides)

    def named(self, pair: Pair) -> str:
        """The standard's name for the standard's prompts; else one that is this pair's whatever its place in a list,
        so that no other list's video is taken for it."""
        prompt, seed = pair
        return f"{prompt}-{seed}.mp4" if self.official else f"{digest(prompt)[:8]}-seed{seed}.mp4"


@dataclass
class Evaluation:
    """A plan that is carried out, as far as the ``cache`` does not hold it; ``place`` says where weights wait."""

    plan: EvaluationPlan
    device: torch.device
    cache: Cache
    place: Callable[[Side], Placement]
    timings: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """The entry of ``evaluations`` in ``result.json``."""
        plan = self.plan
        sums = vbench.prepare(plan.config.dimensions, plan.config.foreign_weights)
        with self._stage("measure"):
            values = self._values()
        with self._stage("vbench"):
            files = {side.prefix: {pair: plan.file(side, pair) for pair in plan.pairs} for side in plan.sides}
            scores, told = judge(files, plan.config, self.device, self.cache, sums, plan.official)
        entry: dict[str, Any] = clean_json(self._entry(values, scores, told))
        return entry

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - begun

    def _entry(self, values: dict[Pair, Values], scores: Scores, told: dict[str, Any]) -> dict[str, Any]:
        plan = self.plan
        judged = gates.judge([value["figures"] for value in values.values()])
        return {
            "prompts": plan.name,
            "texts": list(dict.fromkeys(prompt for prompt, _ in plan.pairs)),
            "seeds": list(dict.fromkeys(seed for _, seed in plan.pairs)),
            "prompt_hash": digest(sorted(plan.pairs)),
            "pairs": len(plan.pairs),
            "official": plan.official,
            "demonstration": len(plan.pairs) < ENOUGH_PAIRS,
            "metrics": {name: _estimated(name, items) for name, items in {**_by_metric(values), **scores}.items()},
            "gates": {gate.name: gate.as_json() for gate in judged},
            "gates_failed": [gate.name for gate in judged if not gate.passed],
            "verdict": "pass" if all(gate.passed for gate in judged) else "fail",
            "vbench": told,
            "sides": {side.name: {"source": str(side.source), "fingerprint": side.fingerprint} for side in plan.sides},
            "timings": self.timings,
            "provenance": {**provenance(self.device), **launch.shares()},
        }

    def _values(self) -> dict[Pair, Values]:
        """Of every pair; and all videos on the disk at the end. Only LPIPS that is asked for by name has pairs measured
        again that lack it."""
        plan = self.plan
        asked = len(plan.sides) > 1 and plan.config.lpips == "on"
        known = {pair: value for pair, value in plan.known.items() if not asked or "lpips" in value["metrics"]}
        todo = [pair for pair in plan.pairs if pair not in known or not plan.is_there(pair)]
        if todo:
            self.plan = plan.identified()
            known |= self._measured(todo)
        return {pair: known[pair] for pair in plan.pairs}

    def _measured(self, todo: Sequence[Pair]) -> dict[Pair, Values]:
        """Generates what is lacking, and measures it, pair by pair."""
        plan = self.plan
        lpips = perceptual.settled(plan.config.lpips) if len(plan.sides) > 1 else "off"
        taken_by = flow.settled(plan.config.flow) if len(plan.sides) > 1 else "farneback"
        config = dataclasses.replace(plan.config, lpips=lpips, flow=taken_by)
        cells, names = self._cells(config), {digest(pair)[:32]: pair for pair in todo}
        scenes = plan.sides[0].model.language == "scenes"
        lacking = [pair for name, pair in names.items() if cells.get(name) is None or not plan.is_there(pair)]
        decode = self._decoder(lacking) if lacking else None
        networks = Networks.of(config, self.device) if lacking else Networks()
        with progress("measure", len(lacking), "pair") as tick:

            def decoded(pair: Pair) -> list[Sample]:
                assert decode is not None
                samples = decode(pair)
                tick()
                return samples

            def measure(chosen: list[str]) -> list[Values]:
                return [_values_of(decoded(names[name]), scenes, networks) for name in chosen]

            found = cells.shared(list(names), measure, itertools.repeat(1))
            for pair in lacking:  # measured by another process, or for another folder
                if not plan.is_there(pair):
                    decoded(pair)
        return {names[name]: value for name, value in found.items()}

    def _cells(self, config: EvalConfig) -> Cells:
        """For these models asked in this way; videos of a batch round by each other, so the lists count."""
        sides, model = self.plan.sides, self.plan.sides[0].model
        more = {"pictures": [p.sha256 for p in sides[0].pictures.values()], "registered": list(REGISTERED)}
        counted = {
            "generation": dataclasses.asdict(model.generation),
            "sides": [(s.fingerprint, s.how, dataclasses.asdict(s.model.outliers)) for s in sides],
            "lists": self.plan.lists,
            "batch": model.batch,
            "language": model.language,
            "lpips": config.lpips,
            "flow": config.flow,
            **{name: value for name, value in more.items() if value},
        }
        return self.cache.cells("pairs", signature(counted, "", self.device))

    def _decoder(self, todo: Sequence[Pair]) -> Callable[[Pair], list[Sample]]:
        """Generates these pairs on all sides, one transformer in memory at a time; the function decodes a pair, each
        side by its own VAE, and writes its files."""
        made: list[tuple[Pipeline, dict[Pair, tuple[Path, int]]]] = []
        pipeline: CachedPipeline | None = None
        sides = self.plan.sides
        for before, side in zip((None, *sides), sides, strict=False):
            if pipeline is None or before is None or (side.source, side.model) != (before.source, before.model):
                _forget_all_but_vae(pipeline)
                pipeline = side.pipeline(self.place(side), self.cache)
            where: dict[Pair, tuple[Path, int]] = {}
            for pairs in self.plan.lists:
                for group, folder in pipeline.batches(f"generate {side.name}", pairs, side.how, only=todo):
                    where |= {pair: (folder, number) for number, pair in enumerate(group)}
            made.append((pipeline.pipe, where))
        _forget_all_but_vae(pipeline)

        def decode(pair: Pair) -> list[Sample]:
            latents = [(pipe, load_latents(*where[pair])) for pipe, where in made]
            samples = [Sample(*pair, final, decode_video(pipe, final)) for pipe, final in latents]
            self._write(pair, samples)
            return samples

        return decode

    def _write(self, pair: Pair, samples: Sequence[Sample]) -> None:
        plan, fps = self.plan, self.plan.sides[0].model.generation.fps
        frames = [pictures.to_uint8(sample.video) for sample in samples]
        for side, pixels in zip(plan.sides, frames, strict=True):
            path = plan.file(side, pair)
            if path != side.files.get(pair):  # what another version of the code has left gives way
                pictures.write_mp4(path, pixels, fps)
        if len(samples) > 1 and pair in plan.pairs[:FILMS] and pair not in plan.sides[0].files:
            both = pictures.side_by_side(frames[1::-1], [side.name for side in plan.sides[1::-1]])
            pictures.write_mp4(plan.folder / "side_by_side" / plan.named(pair), both, fps)


def _forget_all_but_vae(pipeline: CachedPipeline | None) -> None:
    for pipe in () if pipeline is None else (pipeline.pipe,):
        for name in set(pipe.components) - {"vae", "scheduler"}:
            setattr(pipe, name, None)


def _values_of(samples: Sequence[Sample], scenes: bool, networks: Networks) -> Values:
    """Of one pair, by its samples of all sides."""
    sample, reference = samples[0], samples[1] if len(samples) > 1 else None
    metrics = of_pair(sample, reference, scenes, networks)
    if reference is not None and len(samples) > 2:
        floor = distances(reference, samples[2], scenes, networks)
        metrics |= {f"floor_ulp.{name}": value for name, value in floor.items()}
    return {"metrics": metrics, "figures": gates.figures_of(sample, reference)}


def _by_metric(values: dict[Pair, Values]) -> Scores:
    """What all pairs have been measured by."""
    found: Scores = {}
    for pair, value in values.items():
        for name, number in value["metrics"].items():
            found.setdefault(name, []).append(Item(*pair, number))
    return with_differences({name: items for name, items in found.items() if len(items) == len(values)})


def _estimated(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Differences get Student's interval, as all comparisons do."""
    between = name.startswith("difference.") or (name.startswith("floor_ulp.") and "vbench." in name)
    return (compared if between else estimate)(items).as_json()
