"""How far a video is from the BF16 one of the same prompt and noise: latent SQNR, PSNR, SSIM."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from wanquant.wan.generate import Sample

#: Decibels reported at most, and for two that are equal, whose ratio is infinite: means need a number.
EQUAL_DB = 100.0


def latent_sqnr(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """10 log10(sum r² / sum (r - q)²) in dB, at most ``EQUAL_DB``; NaN if either is not finite."""
    reference, latents = reference.double(), latents.double()
    if not (reference.isfinite().all() and latents.isfinite().all()):
        return float("nan")
    noise = (reference - latents).square().sum()
    return EQUAL_DB if noise == 0 else _decibel_cap(float(10 * torch.log10(reference.square().sum() / noise)))


def compare(reference: Sample, sample: Sample) -> dict[str, float]:
    """All fidelity metrics of one pair. SSIM is Wang et al. 2004, Gaussian window of 11, on RGB frames."""
    assert reference.prompt == sample.prompt
    expected, shown = _frames(reference.video), _frames(sample.video)
    same = np.array_equal(reference.video, sample.video)
    return {
        "latent_sqnr": latent_sqnr(reference.latents, sample.latents),
        "psnr": EQUAL_DB if same else _decibel_cap(float(peak_signal_noise_ratio(shown, expected, data_range=1.0))),
        "ssim": float(structural_similarity_index_measure(shown, expected, data_range=1.0)),
    }


def _decibel_cap(value: float) -> float:
    """At most ``EQUAL_DB``; NaN stays NaN."""
    return EQUAL_DB if value > EQUAL_DB else value


def _frames(video: np.ndarray) -> torch.Tensor:
    """[frames, height, width, 3] to [frames, 3, height, width]."""
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()
