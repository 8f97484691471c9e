"""Collapse gates: is this a video at all? Averages cannot tell, so these are hard.

A collapsed model still scores well on consistency and smoothness (a static grey video is perfectly
smooth). Each gate has a figure and a threshold, measured on the videos of a run beside those of
BF16; one bad video fails the gate, and a failed gate fails the run's verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wanquant.evaluate import motion
from wanquant.wan.generate import Sample


@dataclass(frozen=True)
class Gate:
    """``measure(sample, reference)`` beyond ``threshold`` in the bad direction fails the gate."""

    name: str
    measure: Callable[[Sample, Sample], float]
    threshold: float
    bad_if: str
    meaning: str

    def fails(self, value: float) -> bool:
        # Written so that a NaN figure fails.
        return not (value >= self.threshold if self.bad_if == "below" else value <= self.threshold)


@dataclass(frozen=True)
class GateResult(Gate):
    """With the figures of all videos."""

    figures: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return not any(self.fails(figure) for figure in self.figures)

    @property
    def worst(self) -> int:
        """The index of the worst figure; nothing is worse than a NaN."""
        badness = np.array(self.figures) * (-1 if self.bad_if == "below" else 1)
        return int(np.argmax(np.where(np.isnan(badness), np.inf, badness)))

    def as_json(self) -> dict[str, object]:
        return {
            "verdict": "pass" if self.passed else "fail",
            "figure": self.figures[self.worst],
            "threshold": self.threshold,
            "bad_if": self.bad_if,
            "worst_item": self.worst,
            "meaning": self.meaning,
            "per_item": list(self.figures),
        }


def _share_not_finite(sample: Sample, _: Sample) -> float:
    """Of pixels and latents: the VAE's closing clamp hides an infinity from the pixels."""
    finite = np.isfinite(sample.video).sum() + np.isfinite(sample.latents.numpy()).sum()
    return float(1 - finite / (sample.video.size + sample.latents.numel()))


def brightness(video: np.ndarray) -> float:
    """The 99th percentile over pixels of the brightest channel, 0 to 1."""
    return float(np.quantile(video.max(-1), 0.99))


def contrast(video: np.ndarray) -> float:
    """Standard deviation within frames, 0 to 0.5."""
    return float(video.std((1, 2)).mean())


def change(video: np.ndarray) -> float:
    """Root mean square change from frame to frame, 0 to 1."""
    return float(np.sqrt(np.square(np.diff(video, axis=0)).mean()))


def roughness(video: np.ndarray) -> float:
    """Of a pixel minus the mean of its four neighbours, against the contrast: 1.12 for white noise however faint,
    0.2 and less for a picture. (Root mean squares; 0 where there is no contrast at all.)"""
    inner = video[:, 1:-1, 1:-1]
    around = video[:, :-2, 1:-1] + video[:, 2:, 1:-1] + video[:, 1:-1, :-2] + video[:, 1:-1, 2:]
    rough, spread = np.sqrt(np.square(inner - around / 4).mean()), np.sqrt(video.var((1, 2)).mean())
    return float(rough / spread) if not spread <= 1e-4 else 0.0


def _against(measure: Callable[[np.ndarray], float]) -> Callable[[Sample, Sample], float]:
    """The measure over the reference's; 1 where the reference has nothing of it either, NaN where it is broken."""

    def ratio(sample: Sample, reference: Sample) -> float:
        ours, theirs = measure(sample.video), measure(reference.video)
        if np.isnan(theirs):
            return theirs
        return ours / theirs if theirs > 1e-3 else 1.0

    return ratio


def _alone(measure: Callable[[np.ndarray], float]) -> Callable[[Sample, Sample], float]:
    return lambda sample, _: measure(sample.video)


def _color_shift(sample: Sample, reference: Sample) -> float:
    """Largest change of a channel's mean, 0 to 1."""
    return float(np.abs(sample.video.mean((0, 1, 2)) - reference.video.mean((0, 1, 2))).max())


def _added_roughness(sample: Sample, reference: Sample) -> float:
    return roughness(sample.video) - roughness(reference.video)


def _frozen(sample: Sample, reference: Sample) -> float:
    return motion.frozen_share(reference.video, sample.video)


def _speed(sample: Sample, reference: Sample) -> float:
    return motion.speed_ratio(reference.video, sample.video)


GATES = (
    Gate("finite", _share_not_finite, 0.0, "above", "share of values that are NaN or Inf"),
    Gate("black", _against(brightness), 0.1, "below", "brightness against BF16"),
    Gate("constant", _against(contrast), 0.1, "below", "contrast within frames against BF16"),
    Gate("static", _against(change), 0.1, "below", "change from frame to frame against BF16"),
    Gate("frozen", _frozen, 0.25, "above", "share of the time in which BF16 moves and this does not"),
    Gate("slow_motion", _speed, 0.7, "below", "speed of what moves against BF16"),
    Gate("color_shift", _color_shift, 0.25, "above", "change of a channel's mean against BF16"),
    Gate("noise", _added_roughness, 0.4, "above", "roughness beyond BF16's"),
)
#: What BF16 itself has to pass: against a collapsed reference anything looks fine.
REFERENCE_GATES = (
    Gate("bf16.finite", _share_not_finite, 0.0, "above", "share of values that are NaN or Inf"),
    Gate("bf16.black", _alone(brightness), 0.03, "below", "brightness of BF16"),
    Gate("bf16.constant", _alone(contrast), 0.003, "below", "contrast within frames of BF16"),
    Gate("bf16.static", _alone(change), 0.0005, "below", "change from frame to frame of BF16"),
    Gate("bf16.noise", _alone(roughness), 0.7, "above", "roughness of BF16"),
)
#: Where there is no reference, a model's own videos have to pass what BF16 has to.
ALONE_GATES = tuple(
    replace(gate, name=f"alone{gate.name.removeprefix('bf16')}", meaning=gate.meaning.removesuffix(" of BF16"))
    for gate in REFERENCE_GATES
)


def check(samples: Sequence[Sample], references: Sequence[Sample]) -> list[GateResult]:
    """All gates over paired samples, then those that BF16 has to pass alone."""
    return judge([figures_of(*pair) for pair in zip(samples, references, strict=True)])


def figures_of(sample: Sample, reference: Sample | None) -> dict[str, float]:
    """Of one pair, by gate. Without a reference only those that a video has to pass alone."""
    if reference is None:
        return {gate.name: gate.measure(sample, sample) for gate in ALONE_GATES}
    beside = {gate.name: gate.measure(sample, reference) for gate in GATES}
    return beside | {gate.name: gate.measure(reference, reference) for gate in REFERENCE_GATES}


def judge(found: Sequence[dict[str, float]]) -> list[GateResult]:
    """By ``figures_of`` every pair; of none there are no gates."""
    gates = [gate for gate in (*GATES, *REFERENCE_GATES, *ALONE_GATES) if found and gate.name in found[0]]
    return [GateResult(**vars(gate), figures=tuple(of_pair[gate.name] for of_pair in found)) for gate in gates]
