"""What the tables show, by the name in ``metrics``: name, title, unit."""

from __future__ import annotations

from typing import Any

FIDELITY = (("latent_sqnr", "latent SQNR", "dB"), ("psnr", "PSNR", "dB"), ("ssim", "SSIM", ""))
#: How the error looks; ``wanquant.evaluate.compare.register_metric`` appends to it.
FURTHER = [
    ("error_flicker", "error flicker", ""),
    ("motion_energy", "motion energy", "dB"),
    ("color_mean", "colour mean", "levels"),
    ("color_spread", "colour spread", "levels"),
    ("color_histogram", "colour histogram", "levels"),
    ("lpips", "LPIPS", ""),
]
FLOORS = (
    ("", "quantized"),
    ("floor_ulp.", "BF16, noise perturbed by 1 ulp"),
    ("floor_seed.", "BF16, another seed"),
)
ATTRIBUTES = ("color", "shape", "direction", "background", "attributes")
#: VBench's dimensions that notice a collapse: consistency and smoothness cannot, since a frozen grey video is perfectly
#: smooth. Where means are shown these are shown, be it that they were not measured.
NOTICE_COLLAPSE = ("imaging_quality", "dynamic_degree", "overall_consistency")


def rows_of(result: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Prefixes and labels of the rows of a run's table. Only a training has an untrained baseline."""
    if "over_untrained" not in result:
        return FLOORS
    labels = ("trained", "not trained") if result["qat"]["quantize"] else ("fine-tuned", "BF16 as it was")
    return (("", labels[0]), ("untrained.", labels[1]), *FLOORS[1:])
