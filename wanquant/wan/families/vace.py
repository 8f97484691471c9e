"""VACE: a Wan transformer with a second list of blocks, each beside one of the first, which read a control video and
reference pictures.

Videos are made from text, or from text and a reference picture; the control video is empty, as the pipeline has it by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel

from wanquant.wan.config import GenerationConfig
from wanquant.wan.families.family import Family, Make, Text

REFERENCES = "reference_images"


@dataclass(frozen=True)
class VACEFamily(Family):
    @property
    def takes_pictures(self) -> bool:
        return True

    @property
    def needs_pictures(self) -> bool:
        return False

    @property
    def picture_frames(self) -> int:
        return 1

    def lengths(self, config: Mapping[str, Any]) -> list[int]:
        return [config["num_layers"], len(config["vace_layers"])]

    def sized(self, config: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """As small as the transformer gets where a list is to be empty: it has a block 0, and one beside it."""
        both = max(1, lengths[1])
        return {**config, "num_layers": max(lengths[0], both), "vace_layers": list(range(both))}

    def beside(self, config: Mapping[str, Any]) -> Sequence[int]:
        found: Sequence[int] = config["vace_layers"]
        return found

    def inputs(
        self, config: Any, size: tuple[int, int, int], settings: GenerationConfig, rows: int, make: Make, **how: Any
    ) -> dict[str, Any]:
        found = super().inputs(config, size, settings, rows, make, **how)
        return {**found, "control_hidden_states": make(rows, config["vace_in_channels"], *size, dtype=torch.bfloat16)}

    def shown(self, picture: Any) -> dict[str, Any]:
        return {REFERENCES: [picture]}

    def denoise(
        self, pipe: Any, text: Text, negative: Text, noise: torch.Tensor, settings: GenerationConfig, **given: Any
    ) -> torch.Tensor:
        """The first frames of the noise become the reference pictures, and are no part of the video."""
        found = super().denoise(pipe, text, negative, noise, settings, **given)
        return found[:, :, len(given.get(REFERENCES, ())) :].contiguous()


VACE = VACEFamily(
    WanVACEPipeline,
    WanVACETransformer3DModel,
    block_lists={"blocks": "num_layers", "vace_blocks": "vace_layers"},
)
