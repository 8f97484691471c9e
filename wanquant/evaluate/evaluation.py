"""What is measured on one list of (prompt, seed) pairs: of a judged model, and of BF16 beside it where there is one.

Videos that are there are taken as they are; the others are generated, decoded and written one by one. What was
measured on a pair is kept in the cache, as every score of VBench's is, so that a killed evaluation goes on, and several
processes that do the same share it.
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

from wanquant.evaluate import gates, perceptual, vbench
from wanquant.evaluate.compare import of_pair, with_differences
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.frames import stands_in
from wanquant.evaluate.prompts import Pair, following, official_prompts
from wanquant.evaluate.stats import ENOUGH_PAIRS, Item, compared, difference, estimate
from wanquant.runs import pictures
from wanquant.runs.cache import Cache, Cells
from wanquant.runs.progress import progress
from wanquant.runs.run import digest, provenance, signature
from wanquant.wan.config import ModelConfig
from wanquant.wan.generate import Sample, decode_video
from wanquant.wan.load import LOAD_PARTS, count_files, fingerprint, load_pipeline
from wanquant.wan.outliers import plant_outliers_
from wanquant.wan.studio import Studio

#: Pairs of which a film of both sides is written for the report.
FILMS = 8


@dataclass
class Side:
    """One of the models: ``source`` is its pipeline's folder, ``model`` how to ask it for a video, ``files`` the videos
    that are there. Without a ``fingerprint`` it is found out, if the source is needed at all; else it has to fit."""

    name: str
    prefix: str
    source: Path
    model: ModelConfig
    files: dict[Pair, Path] = field(default_factory=dict)
    fingerprint: str = ""

    def identify(self) -> None:
        """Reads all of its files, once."""
        with progress(f"read {self.name}", count_files(self.source), "file") as tick:
            found = fingerprint(self.source, tick)
        if self.fingerprint not in ("", found):
            raise ValueError(f"{self.source} is not the model this run was made with: give that as reference=<folder>")
        self.fingerprint = found

    def studio(self, device: torch.device, cache: Cache) -> Studio:
        with progress(f"load {self.name}", LOAD_PARTS, "part") as tick:
            pipe = load_pipeline(self.source, str(device), tick)
        plant_outliers_(pipe.transformer, self.model.outliers)
        return Studio(pipe, self.model, self.fingerprint, device, cache)


@dataclass
class Evaluation:
    """``lists`` are the pairs as they are generated, in batches along each list; ``known`` what a run has measured of a
    pair already; ``extra`` further videos of BF16 for VBench alone, by prefix: the noise floor."""

    name: str
    folder: Path
    sides: list[Side]
    lists: list[list[Pair]]
    config: EvalConfig
    device: torch.device
    cache: Cache
    official: bool = False
    known: dict[Pair, dict[str, dict[str, float]]] = field(default_factory=dict)
    extra: dict[str, dict[Pair, Path]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.lists for pair in pairs]

    @property
    def scenes(self) -> bool:
        return self.sides[0].model.language == "scenes"

    def run(self, dimensions: Sequence[str]) -> dict[str, Any]:
        """The entry of ``evaluations`` in ``result.json``."""
        sums = vbench.prepare(dimensions, self.config.foreign_weights)
        with self._stage("measure"):
            values = self._values()
        with self._stage("vbench"):
            scores, told = self._scores(dimensions, sums)
        items = {**_by_metric(values), **scores}
        seeds = list(dict.fromkeys(seed for _, seed in self.pairs))
        figures = [value["figures"] for value in values.values() if value["figures"]]
        judged = gates.judge(figures) if len(figures) == len(values) else []
        return {
            "prompts": self.name,
            "texts": list(dict.fromkeys(prompt for prompt, _ in self.pairs)),
            "seeds": seeds,
            "prompt_hash": digest(self.pairs),
            "pairs": len(self.pairs),
            "official": self.official,
            "demonstration": len(self.pairs) < ENOUGH_PAIRS,
            "metrics": {name: _estimated(name, found) for name, found in items.items()},
            "gates": {gate.name: gate.as_json() for gate in judged},
            "verdict": "pass" if all(gate.passed for gate in judged) else "fail",
            "vbench": told,
            "sides": {side.name: {"source": str(side.source), "fingerprint": side.fingerprint} for side in self.sides},
            "timings": dict(self.timings),
            "provenance": provenance(self.device),
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - begun

    # Fidelity, attributes, gates

    def _values(self) -> dict[Pair, dict[str, dict[str, float]]]:
        """Of every pair its ``metrics`` and gates' ``figures``, and all videos on the disk at the end."""
        wants_lpips = len(self.sides) > 1 and self._lpips_wanted()
        known = {pair: value for pair, value in self.known.items() if not wants_lpips or "lpips" in value["metrics"]}
        todo = [pair for pair in self.pairs if pair not in known or not self.there(pair)]
        if todo:
            known |= self._made(todo, wants_lpips)
        return {pair: known[pair] for pair in self.pairs}

    def _lpips_wanted(self) -> bool:
        return self.config.lpips == "on" or (self.config.lpips == "auto" and perceptual.there())

    def _made(self, todo: Sequence[Pair], wants_lpips: bool) -> dict[Pair, dict[str, dict[str, float]]]:
        for side in self.sides:
            side.identify()
        cells, names = self._cells(wants_lpips), {digest(pair)[:32]: pair for pair in todo}
        lacking = [pair for name, pair in names.items() if cells.get(name) is None or not self.there(pair)]
        decode = self._decoder(lacking) if lacking else None
        lpips = perceptual.distance(self.config.lpips, self.device) if wants_lpips and lacking else None
        with progress("measure", len(lacking), "pair") as tick:

            def measure(chosen: list[str]) -> list[Any]:
                assert decode is not None
                (pair,) = (names[name] for name in chosen)
                samples = decode(pair)
                sample, reference = samples[0], samples[1] if len(samples) > 1 else None
                tick()
                return [
                    {
                        "metrics": of_pair(sample, reference, self.scenes, lpips),
                        "figures": gates.figures_of(sample, reference),
                    }
                ]

            found = cells.shared(list(names), measure, itertools.repeat(1))
            for pair in lacking:  # measured by another process or for another folder
                if not self.there(pair):
                    assert decode is not None
                    decode(pair)
                    tick()
        return {names[name]: value for name, value in found.items()}

    def _cells(self, wants_lpips: bool) -> Cells:
        """For these models asked in this way; videos of a batch round by each other, so the lists count."""
        counted = {
            "generation": dataclasses.asdict(self.sides[0].model.generation),
            "outliers": [dataclasses.asdict(side.model.outliers) for side in self.sides],
            "sides": [side.fingerprint for side in self.sides],
            "lists": self.lists,
            "batch": self.sides[0].model.batch,
            "language": self.sides[0].model.language,
            "lpips": wants_lpips,
        }
        return self.cache.cells("pairs", signature(counted, "", self.device))

    def _decoder(self, todo: Sequence[Pair]) -> Callable[[Pair], list[Sample]]:
        """Generates the latents of these pairs on all sides, one model in memory at a time; the function decodes a pair
        and writes its files."""
        latents: list[dict[Pair, torch.Tensor]] = []
        studio: Studio | None = None
        for side in self.sides:
            studio = None  # before the next one is loaded
            studio = side.studio(self.device, self.cache)
            latents.append({})
            for pairs in self.lists:
                if set(pairs) & set(todo):
                    found, _ = studio.latents(f"generate {side.name}", pairs)
                    latents[-1] |= dict(zip(pairs, found, strict=True))
        assert studio is not None
        pipe = studio.pipe

        def decode(pair: Pair) -> list[Sample]:
            samples = [Sample(*pair, of[pair], decode_video(pipe, of[pair])) for of in latents]
            self._write(pair, samples)
            return samples

        return decode

    def _write(self, pair: Pair, samples: Sequence[Sample]) -> None:
        frames = [pictures.to_uint8(sample.video) for sample in samples]
        fps, place = self.sides[0].model.generation.fps, self.pairs.index(pair)
        for side, pixels in zip(self.sides, frames, strict=True):
            if not self._file(side, pair).is_file():
                pictures.write_mp4(self._file(side, pair), pixels, fps)
        if len(samples) > 1 and place < FILMS and pair not in self.sides[0].files:
            both = pictures.side_by_side(frames[::-1], [side.name for side in self.sides[::-1]])
            pictures.write_mp4(self.folder / "side_by_side" / self._named(pair), both, fps)

    def there(self, pair: Pair) -> bool:
        return all(self._file(side, pair).is_file() for side in self.sides)

    def _file(self, side: Side, pair: Pair) -> Path:
        there = side.files.get(pair)
        return there if there is not None and there.is_file() else self.folder / side.name / self._named(pair)

    def _named(self, pair: Pair) -> str:
        """The standard's name for the standard's prompts."""
        prompt, seed = pair
        return f"{prompt}-{seed}.mp4" if self.official else f"{self.pairs.index(pair):03d}-seed{seed}.mp4"

    # VBench

    def _scores(self, dimensions: Sequence[str], sums: dict[str, str]) -> tuple[dict[str, list[Item]], dict[str, Any]]:
        """Every score of every side, the paired differences, and what has to be said with them."""
        if not dimensions:
            return {}, {}
        clips = self._clips()
        scores: dict[str, list[Item]] = {}
        nothing: dict[str, str] = {}
        for dimension in dimensions:
            asked = [clips[""][pair] for pair in self._pairs_of(dimension)]
            reasons = {(clip.prompt, clip.seed): vbench.why_not(dimension, clip) for clip in asked}
            pairs = [pair for pair, reason in reasons.items() if not reason]
            if not pairs:
                nothing[dimension] = next(iter(reasons.values()), "none of its prompts")
            for prefix, found in clips.items():
                judged = [found[pair] for pair in pairs if pair in found]
                values = vbench.score(
                    dimension, judged, self.device, self.cache, sums, self.official, prefix.rstrip(".")
                )
                items = [Item(clip.prompt, clip.seed, value) for clip, value in zip(judged, values, strict=True)]
                scores |= {f"{prefix}vbench.{dimension}": items} if items else {}
        if len(nothing) == len(dimensions):
            raise ValueError("; ".join(f"{dimension}: {reason}" for dimension, reason in nothing.items()))
        ours = clips[""].values()
        told = {
            "version": vbench.version(),
            "dimensions": list(dimensions),
            "meanings": {name: vbench.DIMENSIONS[name].meaning for name in dimensions},
            "not_applicable": nothing,
            "weights": sums,
            "foreign_weights": self.config.foreign_weights,
            "reader": "PyAV" if stands_in() else "decord",
            "long": sum(clip.long for clip in ours),
            "seconds": [min(clip.seconds for clip in ours), max(clip.seconds for clip in ours)],
        }
        return _with_floors(scores), told

    def _clips(self) -> dict[str, dict[Pair, vbench.Clip]]:
        """By prefix; of the judged model it is empty."""
        files = {side.prefix: {pair: self._file(side, pair) for pair in self.pairs} for side in self.sides}
        files |= self.extra
        clips: dict[str, dict[Pair, vbench.Clip]] = {}
        with progress("look at videos", sum(map(len, files.values())), "video") as tick:
            for prefix, found in files.items():
                clips[prefix] = {}
                for pair, path in found.items():
                    clips[prefix][pair] = vbench.clip_of(path, *pair)
                    tick()
        return clips

    def _pairs_of(self, dimension: str) -> list[Pair]:
        if not self.official:
            return self.pairs
        wanted = set(official_prompts()[dimension])
        return [pair for pair in self.pairs if pair[0] in wanted]


def _with_floors(scores: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """And the differences: quantized less BF16; BF16 with its noise moved less BF16; another seed of BF16 less it."""
    found = {name: items for name, items in scores.items() if not name.startswith("floor_")}
    found = with_differences(found)
    for name, items in scores.items():
        beside = scores.get(name.replace("floor_ulp.", "bf16."))
        if name.startswith("floor_ulp.") and beside is not None:
            pairs = {(item.prompt, item.seed) for item in items}
            found[name] = difference(items, [item for item in beside if (item.prompt, item.seed) in pairs])
        if name.startswith("bf16."):
            values = {(item.prompt, item.seed): item.value for item in items}
            after = following(list(dict.fromkeys(item.seed for item in items)))
            others = [(item, values.get((item.prompt, after.get(item.seed, -1)))) for item in items]
            moved = [Item(item.prompt, item.seed, other - item.value) for item, other in others if other is not None]
            if moved:
                found[name.replace("bf16.", "floor_seed.")] = moved
    return found


def _by_metric(values: dict[Pair, dict[str, dict[str, float]]]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for pair, value in values.items():
        for name, number in value["metrics"].items():
            found.setdefault(name, []).append(Item(*pair, number))
    return with_differences(found)


def _estimated(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Differences get Student's interval, as all comparisons do."""
    between = name.startswith("difference.") or (name.startswith("floor_") and "vbench." in name)
    return (compared if between else estimate)(items).as_json()
