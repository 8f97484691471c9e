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
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.stats import Item, estimate
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
    """``decibels`` [pairs, steps, branches] at noise levels ``sigmas``, and how many elements overflowed, by linear."""

    pairs: Sequence[Pair]
    frames: int
    sigmas: Sequence[float]
    decibels: np.ndarray
    overflows: Counter[str]

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
    pipeline: CachedPipeline, pairs: Sequence[Pair], config: EvalConfig, label: str = "record BF16"
) -> list[Trajectories]:
    """BF16 trajectories of the model's own number of frames, and of the further ones of ``config``."""
    own = pipeline.model.generation.num_frames
    found = []
    for frames in dict.fromkeys((own, *config.frames)):
        generation = dataclasses.replace(pipeline.model.generation, num_frames=frames)
        as_long = dataclasses.replace(pipeline, model=dataclasses.replace(pipeline.model, generation=generation))
        name, told = (STEP_SQNR, label) if frames == own else (step_metric(frames), f"{label}, {frames} frames")
        found.append(Trajectories(name, as_long, Recording(as_long, pairs, told, config.single_steps)))
    return found


def measure_steps(along: Trajectories, counted: Mapping[str, Any], afresh: bool = False) -> SingleSteps:
    """Of the transformer as it is now, from the cache by what is ``counted``, or measured now, always if ``afresh``."""
    pipeline, recording = along.pipeline, along.recording
    own = {"pairs": recording.pairs, "kept": recording.kept, "batch": pipeline.model.batch}
    cells = pipeline.cache.cells("single_steps", pipeline.signature("single_steps", **own, **counted))

    def measure() -> dict[str, Any]:
        with progress("single steps", recording.passes) as tick:
            now = measured_now(along, tick)
        return {"decibels": clean_json(now.decibels.tolist()), "overflows": now.overflows}

    if afresh:
        cells.put("steps", measure())
    found = cells.measured("steps", measure)
    decibels = np.array(found["decibels"], float)  # of None, NaN
    return SingleSteps(recording.pairs, recording.frames, sigmas_of(along), decibels, Counter(found["overflows"]))


def measured_now(along: Trajectories, on_step: Callable[[], None]) -> SingleSteps:
    """Of the transformer as it is now; ``on_step`` is called ``recording.passes`` times."""
    pipeline, recording, before = along.pipeline, along.recording, along.pipeline.overflowed()
    decibels = np.array(step_sqnrs(pipeline, recording, on_step))
    overflows = Counter({name: count - before[name] for name, count in pipeline.overflowed().items()})
    return SingleSteps(recording.pairs, recording.frames, sigmas_of(along), decibels, +overflows)


def sigmas_of(along: Trajectories) -> list[float]:
    """Noise levels of the recorded steps, 1 where there is nothing but noise."""
    levels = along.pipeline.pipe.scheduler.config.num_train_timesteps
    return [timestep / levels for timestep in along.recording.timesteps()]
