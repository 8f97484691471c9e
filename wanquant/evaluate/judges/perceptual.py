"""LPIPS (Zhang et al. 2018), AlexNet's, by torchmetrics: where torchvision and its weights are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from wanquant.choices import mistaken
from wanquant.evaluate.config import LPIPS
from wanquant.evaluate.judges import weights

#: Two videos [frames, height, width, 3] in 0..1 to their mean distance over frames.
Distance = Callable[[np.ndarray, np.ndarray], float]
#: Frames given to the network at a time.
TOGETHER = 16


def settled(choice: str) -> str:
    """``on`` or ``off``: ``auto`` is on where everything is there. ``ValueError`` says what is missing, or wrong."""
    if choice not in LPIPS:
        raise mistaken("eval.lpips", choice, LPIPS)
    there = importlib.util.find_spec("torchvision") is not None
    if choice == "off" or (choice == "auto" and not (there and not weights.missing([weights.LPIPS]))):
        return "off"
    if not there:
        raise ValueError("eval.lpips=on needs torchvision: pip install 'wanquant[vbench]'")
    weights.checked([weights.LPIPS])
    return "on"


def distance(choice: str, device: torch.device) -> Distance | None:
    """None where it is off."""
    if settled(choice) == "off":
        return None
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity("alex", reduction="sum", normalize=True).to(device)

    @torch.no_grad()
    def between(reference: np.ndarray, video: np.ndarray) -> float:
        if not (np.isfinite(reference).all() and np.isfinite(video).all()):
            return float("nan")
        network.reset()
        for first in range(0, len(video), TOGETHER):
            pair = (frames[first : first + TOGETHER] for frames in (video, reference))
            network.update(*(torch.from_numpy(part).permute(0, 3, 1, 2).to(device) for part in pair))
        return float(network.compute()) / len(video)

    return between
