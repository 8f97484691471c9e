"""RAFT (Teed & Deng 2020), the small one, by torchvision: where it and its weights are there, for ``motion_speed``."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from wanquant.choices import mistaken
from wanquant.evaluate.config import FLOWS
from wanquant.evaluate.judges import weights
from wanquant.evaluate.motion import Flow, farneback

#: Pairs of frames given to the network at a time; the least side it takes, which is a multiple of 8.
TOGETHER, LEAST = 8, 128


def settled(choice: str) -> str:
    """``raft`` or ``farneback``: ``auto`` is RAFT where everything is there. ``ValueError`` says what is missing."""
    if choice not in FLOWS:
        raise mistaken("eval.flow", choice, FLOWS)
    there = importlib.util.find_spec("torchvision") is not None
    if choice == "farneback" or (choice == "auto" and not (there and not weights.missing([weights.RAFT]))):
        return "farneback"
    if not there:
        raise ValueError("eval.flow=raft needs torchvision: pip install 'wanquant[vbench]'")
    weights.checked([weights.RAFT])
    return "raft"


def flow(choice: str, device: torch.device) -> Flow:
    if settled(choice) == "farneback":
        return farneback
    from torchvision.models.optical_flow import raft_small

    (weight,) = weights.needed([weights.RAFT])
    network = raft_small(weights=None, progress=False)
    network.load_state_dict(torch.load(weight.path, map_location="cpu", weights_only=True))
    network = network.eval().to(device)

    @torch.no_grad()
    def raft(video: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(np.asarray(video, np.float32)).permute(0, 3, 1, 2)
        height, width = frames.shape[2:]
        scale = max(1.0, LEAST / min(height, width))
        size = [max(LEAST, round(side * scale / 8) * 8) for side in (height, width)]
        given = torch.nn.functional.interpolate(2 * frames - 1, size, mode="bilinear", align_corners=False)
        found = []
        for first in range(0, len(given) - 1, TOGETHER):
            pair = given[first : first + TOGETHER + 1].to(device)
            found.append(network(pair[:-1], pair[1:])[-1].cpu())
        there = torch.nn.functional.interpolate(torch.cat(found), (height, width), mode="bilinear", align_corners=False)
        # In pixels of the video as it was given.
        there *= torch.tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)
        return np.asarray(there.permute(0, 2, 3, 1))

    return raft
