"""How far a video is from the BF16 one of the same prompt and noise, and in what way.

``latent_sqnr`` of the final latents, ``psnr``, ``ssim``: how far. Averages over pixels do not say how an error looks:

``error_flicker``     does the error change from frame to frame? 1 less its lag-one autocorrelation:
                      sum (e[t+1] - e[t])^2 / (sum e[t]^2 + sum e[t+1]^2); 0 for an error that stands still, 1 for one
                      that is drawn anew in each frame, 2 for one that turns over
``motion_energy``     10 log10 of the mean squared change from frame to frame, ours to BF16's, in dB: below 0 the video
                      freezes, above it jitters; no optical flow is asked
``color_mean``        largest change of a channel's mean, in levels of 255
``color_spread``      largest change of a channel's standard deviation, in levels of 255
``color_histogram``   distance of the channels' histograms (Wasserstein's first, the mean of three), in levels of 255
``lpips``             perceptual distance, where its weights are there
"""

from __future__ import annotations

import math

import numpy as np
import torch

from wanquant.evaluate.judges.perceptual import Distance
from wanquant.wan.generate import Sample
from wanquant.wan.recording import EQUAL_DB as EQUAL_DB


def latent_sqnr(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """10 log10(sum r² / sum (r - q)²) in dB, at most ``EQUAL_DB``; NaN if either is not finite."""
    reference, latents = reference.double(), latents.double()
    if not (reference.isfinite().all() and latents.isfinite().all()):
        return float("nan")
    noise = (reference - latents).square().sum()
    return EQUAL_DB if noise == 0 else _decibel_cap(float(10 * torch.log10(reference.square().sum() / noise)))


def compare(reference: Sample, sample: Sample, lpips: Distance | None = None) -> dict[str, float]:
    """All fidelity metrics of one pair. SSIM is Wang et al. 2004, Gaussian window of 11, on RGB frames."""
    # Imported when a pair is compared: it takes a second.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    assert reference.prompt == sample.prompt
    expected, shown = _frames(reference.video), _frames(sample.video)
    same = np.array_equal(reference.video, sample.video)
    further = {"lpips": lpips(reference.video, sample.video)} if lpips is not None else {}
    return {
        "latent_sqnr": latent_sqnr(reference.latents, sample.latents),
        "psnr": EQUAL_DB if same else _decibel_cap(float(peak_signal_noise_ratio(shown, expected, data_range=1.0))),
        "ssim": float(structural_similarity_index_measure(shown, expected, data_range=1.0)),
        "error_flicker": error_flicker(reference.video, sample.video),
        "motion_energy": motion_energy(reference.video, sample.video),
        **color_statistics(reference.video, sample.video),
        **further,
    }


def error_flicker(reference: np.ndarray, video: np.ndarray) -> float:
    """0 where there is no error, or a single frame."""
    error = video - reference
    energy = np.square(error).sum((1, 2, 3), dtype=np.float64)
    total = float((energy[:-1] + energy[1:]).sum())
    return _change(error) / total if total != 0 else 0.0


def _change(video: np.ndarray) -> float:
    """Squared, from frame to frame, summed."""
    return float(np.square(np.diff(video, axis=0)).sum(dtype=np.float64))


def motion_energy(reference: np.ndarray, video: np.ndarray) -> float:
    """dB within ``EQUAL_DB`` of 0; 0 where neither moves."""
    ours, theirs = _change(video), _change(reference)
    if math.isnan(ours) or math.isnan(theirs):
        return math.nan
    if ours == theirs:
        return 0.0
    if ours == 0 or theirs == 0:
        return -EQUAL_DB if ours == 0 else EQUAL_DB
    return max(-EQUAL_DB, _decibel_cap(10 * math.log10(ours / theirs)))


def color_statistics(reference: np.ndarray, video: np.ndarray) -> dict[str, float]:
    if not (np.isfinite(reference).all() and np.isfinite(video).all()):
        return dict.fromkeys(("color_mean", "color_spread", "color_histogram"), math.nan)
    means, spreads, histograms = (np.subtract(*pair) for pair in zip(_colors(video), _colors(reference), strict=True))
    return {
        "color_mean": float(np.abs(means).max()),
        "color_spread": float(np.abs(spreads).max()),
        "color_histogram": float(np.abs(np.cumsum(histograms, axis=1)).sum(1).mean()),
    }


def _colors(video: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each channel, in levels of 255: mean, standard deviation, and the share of its pixels at each level."""
    levels = [np.round(255 * np.clip(video[..., c], 0, 1)).astype(np.uint8).ravel() for c in range(3)]
    shares = np.array([np.bincount(level, minlength=256) / level.size for level in levels])
    mean, spread = (np.asarray(255 * f(video, axis=(0, 1, 2), dtype=np.float64)) for f in (np.mean, np.std))
    return mean, spread, shares


def _decibel_cap(value: float) -> float:
    """At most ``EQUAL_DB``; NaN stays NaN."""
    return EQUAL_DB if value > EQUAL_DB else value


def _frames(video: np.ndarray) -> torch.Tensor:
    """[frames, height, width, 3] to [frames, 3, height, width]."""
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()
