"""What the tables show, by the name in ``metrics`` of a result, and how an estimate reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: What decides between configurations: the error of single denoising steps; and what judges its drift.
STEP_SQNR, DRIFT = "step_sqnr", "latent_sqnr"
#: Title and unit of what runs are compared by, the first of them before all.
FIDELITY = {
    STEP_SQNR: ("single steps, SQNR", "dB"),
    DRIFT: ("latent SQNR", "dB"),
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "motion_speed": ("motion speed", "of BF16's"),
}
#: How the error looks. May be added to: whoever draws a table looks here when drawing.
FURTHER = {
    "error_flicker": ("error flicker", ""),
    "motion_energy": ("motion energy", "dB"),
    "motion_onset": ("motion onset", "frames later"),
    "motion_spectrum": ("fast changes", "dB"),
    "shape_speed": ("tracked shape's speed", "of BF16's"),
    "color_mean": ("colour mean", "levels"),
    "color_spread": ("colour spread", "levels"),
    "color_histogram": ("colour histogram", "levels"),
    "lpips": ("LPIPS", ""),
}
FLOORS = (
    ("", "quantized"),
    ("floor_ulp.", "BF16, noise perturbed by 1 ulp"),
    ("floor_seed.", "BF16, another seed"),
)
ATTRIBUTES = ("color", "shape", "direction", "background", "attributes")
#: VBench's dimensions that notice a collapse: consistency and smoothness cannot, since a frozen grey video is perfectly
#: smooth. Where means are shown these are shown, be it that they were not measured.
NOTICE_COLLAPSE = ("imaging_quality", "dynamic_degree", "overall_consistency")


def step_metric(frames: int) -> str:
    """Single steps of videos of another length than the model's own."""
    return f"{STEP_SQNR}_{frames}"


def told(name: str) -> tuple[str, str]:
    """Title and unit of a metric; of one that no table names, its own name."""
    if name.startswith(f"{STEP_SQNR}_"):
        title, unit = FIDELITY[STEP_SQNR]
        return f"{title}, {name.rpartition('_')[2]} frames", unit
    known = {**FIDELITY, **FURTHER, "block_sqnr": ("blocks alone, SQNR", "dB")}
    return ("prompts followed", "share") if name in ATTRIBUTES else known.get(name, (name, ""))


def head(name: str) -> str:
    """Of a metric's column: ``PSNR, dB``."""
    return ", ".join(filter(None, told(name)))


def measure(name: str) -> str:
    """A metric as a measure among others, ``PSNR``: VBench's and those of the attributes by their own names."""
    return name if name in ATTRIBUTES else told(name)[0].removeprefix("vbench.")


def fidelity(metrics: Collection[str], prefix: str = "") -> list[str]:
    """Names of the metrics of fidelity that are there, single steps of further lengths beside those of the model's."""
    lengths = [name.removeprefix(prefix) for name in metrics if name.startswith(f"{prefix}{STEP_SQNR}_")]
    first, *rest = FIDELITY
    return [name for name in (first, *lengths, *rest) if prefix + name in metrics]


def present(metrics: Collection[str], prefix: str = "") -> list[str]:
    """Names of the metrics of fidelity, and of those of how the error looks, that are there."""
    return [*fidelity(metrics, prefix), *(name for name in FURTHER if prefix + name in metrics)]


def interval(metric: dict[str, Any]) -> tuple[float, float, float] | None:
    """Mean and bounds; None where one of them is not finite."""
    found = (metric["mean"], *metric["ci95"])
    return None if None in found else found


def estimate_text(metric: dict[str, Any] | None, decimals: int | None = None) -> str:
    """``23.4 [22.9, 24.0]``; a dash for what is unknown, nothing for what was not measured."""
    if metric is None:
        return ""
    mean, low, high = (_number(value, decimals) for value in (metric["mean"], *metric["ci95"]))
    return f"{mean} [{low}, {high}]"


def _number(value: float | None, decimals: int | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{decimals if decimals is not None else 3 if abs(value) < 1.5 else 2}f}"


def short(value: float | None) -> str:
    """Three figures; a dash for what is unknown."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
