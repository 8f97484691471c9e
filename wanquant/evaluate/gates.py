"""Collapse gates: is this a video at all? Averages cannot tell, so these are hard.

A collapsed model still scores well on consistency and smoothness (a static grey video is perfectly
smooth). Each gate has a figure and a threshold, measured on the videos of a run beside those of
BF16; one bad video fails the gate, and a failed gate fails the run's verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gate:
    """``figure(video, reference)`` is compared with ``threshold``: beyond it in the bad direction, the gate fails."""

    name: str
    figure: Callable[[np.ndarray, np.ndarray], float]
    threshold: float
    bad_if: str
    meaning: str

    def fails(self, value: float) -> bool:
        # Written so that a NaN figure fails.
        return not (value >= self.threshold if self.bad_if == "below" else value <= self.threshold)


@dataclass(frozen=True)
class GateResult:
    """The worst figure over all videos and where it was met."""

    name: str
    passed: bool
    figure: float
    threshold: float
    worst: int

    def as_json(self) -> dict[str, object]:
        return {
            "verdict": "pass" if self.passed else "fail",
            "figure": self.figure,
            "threshold": self.threshold,
            "worst_item": self.worst,
        }


def _share_not_finite(video: np.ndarray, reference: np.ndarray) -> float:
    return float(1 - np.isfinite(video).mean())


def _brightest(video: np.ndarray, reference: np.ndarray) -> float:
    """The 99th percentile of brightness, against the reference's: 0 for a black video."""
    return _ratio(float(np.quantile(video.max(-1), 0.99)), float(np.quantile(reference.max(-1), 0.99)))


def _contrast(video: np.ndarray, reference: np.ndarray) -> float:
    """Spread over the picture, against the reference's: 0 for a constant video."""
    return _ratio(float(video.std((1, 2)).mean()), float(reference.std((1, 2)).mean()))


def motion(video: np.ndarray) -> float:
    """Root mean square change from frame to frame, in 0..1."""
    return float(np.sqrt(np.square(np.diff(video, axis=0)).mean()))


def _motion_ratio(video: np.ndarray, reference: np.ndarray) -> float:
    """Motion energy against the reference's: 0 for a still; 1 where the reference does not move either."""
    return _ratio(motion(video), motion(reference))


def _color_shift(video: np.ndarray, reference: np.ndarray) -> float:
    """Largest change of a channel's mean, 0..1."""
    return float(np.abs(video.mean((0, 1, 2)) - reference.mean((0, 1, 2))).max())


def _noise(video: np.ndarray, reference: np.ndarray) -> float:
    """Roughness beyond the reference's: about 0.3 for white noise, about 0 for a picture."""
    return _roughness(video) - _roughness(reference)


def _roughness(video: np.ndarray) -> float:
    """Root mean square of the Laplacian of each frame, over 4 (which makes it at most 2)."""
    inner = video[:, 1:-1, 1:-1]
    around = video[:, :-2, 1:-1] + video[:, 2:, 1:-1] + video[:, 1:-1, :-2] + video[:, 1:-1, 2:]
    return float(np.sqrt(np.square(inner - around / 4).mean()))


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 1e-3 else 1.0


GATES = (
    Gate("finite", _share_not_finite, 0.0, "above", "share of values that are NaN or Inf"),
    Gate("black", _brightest, 0.1, "below", "brightness against BF16"),
    Gate("constant", _contrast, 0.1, "below", "contrast within frames against BF16"),
    Gate("static", _motion_ratio, 0.1, "below", "motion against BF16"),
    Gate("color_shift", _color_shift, 0.25, "above", "change of a channel's mean against BF16"),
    Gate("noise", _noise, 0.1, "above", "roughness beyond BF16's"),
)


def check(videos: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[GateResult]:
    """All gates over paired videos [frames, height, width, 3] in 0..1."""
    results = []
    for gate in GATES:
        figures = [gate.figure(v, r) for v, r in zip(videos, references, strict=True)]
        badness = np.array([-f if gate.bad_if == "below" else f for f in figures])
        worst = int(np.argmax(np.where(np.isnan(badness), np.inf, badness)))
        passed = not any(gate.fails(figure) for figure in figures)
        results.append(GateResult(gate.name, passed, figures[worst], gate.threshold, worst))
    return results
