"""The error of single denoising steps along BF16 trajectories, which decides between configurations.

A final latent has the errors of all steps in it, each magnified by what follows, so that over two dozen videos its SQNR
is known to ±2 dB. Here the quantized transformer is given BF16's own noisy latents, step by step and branch by branch,
and its output is compared with BF16's: known to ±0.2 dB, for one forward pass a recorded step. What it cannot see is
drift, how errors add up over a trajectory: that stays with the final latents.

A value is 10 log10(sum v² / sum (v - q)²) in dB of one (pair, step, branch), v and q being the velocities; a pair has
the mean of its values, and intervals are clustered by prompt, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wanquant.evaluate.stats import Item, estimate
from wanquant.runs import launch
from wanquant.runs.progress import progress
from wanquant.runs.reports.columns import STEP_SQNR, step_metric
from wanquant.runs.run import clean_json
from wanquant.wan.cached import CachedPipeline, Pair
from wanquant.wan.recording import Recording, step_sqnrs


@dataclass(frozen=True)
class Trajectories:
    """A ``recording``, and the pipeline with the number of frames it was made with; ``name`` is the metric's."""

    name: str
    pipeline: CachedPipeline
    recording: Recording


@dataclass(frozen=True)
class SingleSteps:
    """``decibels`` [pairs, steps, branches] at noise levels ``sigmas``, and what quantized linears counted
    (``CachedPipeline.counted``)."""

    pairs: Sequence[Pair]
    frames: int
    sigmas: Sequence[float]
    decibels: np.ndarray
    counts: Counter[str]

    def items(self) -> list[Item]:
        means = self.decibels.mean((1, 2))
        return [Item(*pair, float(mean)) for pair, mean in zip(self.pairs, means, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Means over pairs and intervals, by step and by branch (with the prompt, without)."""
        return {
            "frames": self.frames,
            "sigma": list(self.sigmas),
            "by_step": [self._mean(self.decibels[:, step].mean(1)) for step in range(len(self.sigmas))],
            "by_branch": [self._mean(self.decibels[:, :, branch].mean(1)) for branch in range(self.decibels.shape[2])],
        }

    def _mean(self, values: np.ndarray) -> dict[str, Any]:
        found = estimate([Item(*pair, float(value)) for pair, value in zip(self.pairs, values, strict=True)])
        return {"mean": found.mean, "ci95": [found.low, found.high]}


def record(
    pipeline: CachedPipeline, pairs: Sequence[Pair], steps: int, label: str = "record BF16", alone: bool = False
) -> list[Trajectories]:
    """BF16 trajectories of the model's own number of frames, and of its ``other_frames`` unless it is ``alone``."""
    own = pipeline.model.generation.num_frames
    found = []
    for frames in dict.fromkeys((own, *([] if alone else pipeline.model.other_frames))):
        generation = dataclasses.replace(pipeline.model.generation, num_frames=frames)
        as_long = dataclasses.replace(pipeline, model=dataclasses.replace(pipeline.model, generation=generation))
        name, told = (STEP_SQNR, label) if frames == own else (step_metric(frames), f"{label}, {frames} frames")
        found.append(Trajectories(name, as_long, Recording(as_long, pairs, told, steps)))
    return found


def measure_steps(along: Trajectories, counted: Mapping[str, Any], afresh: bool = False) -> SingleSteps:
    """Of the transformer as it is now, batch by batch from the cache by what is ``counted``, or measured now; always
    if ``afresh``."""
    pipeline, recording = along.pipeline, along.recording
    signed = [
        pipeline.signature("single_steps", pairs=pairs, kept=recording.kept, **counted) for pairs, _ in recording.groups
    ]
    cells = [pipeline.cache.cells("single_steps", each) for each in signed]
    if afresh:

        def forget() -> None:
            for cell in cells:
                cell.forget("steps")

        launch.once(f"afresh {signed[0]}", forget)
    missing = [cell.get("steps") is None for cell in cells]
    label = f"single steps, {recording.frames} frames"
    with progress(label, sum(missing) * recording.steps) if any(missing) else nullcontext(lambda: None) as tick:
        measures = [partial(_measure_batch, along, batch, tick) for batch in range(len(cells))]
        for cell, measure in zip(cells, measures, strict=True):
            cell.offer("steps", measure)
        found = [cell.measured("steps", measure) for cell, measure in zip(cells, measures, strict=True)]
    pipeline.note(label, known=not any(missing))
    return _joined(along, found)


def _measure_batch(along: Trajectories, batch: int, on_step: Callable[[], None]) -> dict[str, Any]:
    before = along.pipeline.counted()
    decibels = step_sqnrs(along.pipeline, along.recording, batch, on_step)
    grown = {name: count - before[name] for name, count in along.pipeline.counted().items() if count > before[name]}
    return {"decibels": clean_json(decibels), "counts": grown}  # of NaN, None


def measured_now(along: Trajectories, on_step: Callable[[], None]) -> SingleSteps:
    """Of the transformer as it is now, and kept nowhere; ``on_step`` is called ``recording.passes`` times."""
    return _joined(along, [_measure_batch(along, batch, on_step) for batch in range(len(along.recording.groups))])


def _joined(along: Trajectories, batches: Sequence[dict[str, Any]]) -> SingleSteps:
    recording = along.recording
    decibels = np.array([pair for batch in batches for pair in batch["decibels"]], float)  # of None, NaN
    counts = sum((Counter(batch["counts"]) for batch in batches), Counter[str]())
    return SingleSteps(recording.pairs, recording.frames, sigmas_of(along), decibels, counts)


def sigmas_of(along: Trajectories) -> list[float]:
    """Noise levels of the recorded steps, 1 where there is nothing but noise."""
    levels = along.pipeline.pipe.scheduler.config.num_train_timesteps
    return [timestep / levels for timestep in along.recording.timesteps()]
