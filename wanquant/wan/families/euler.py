"""Families of flow-matching models that are denoised by Euler's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from wanquant.wan.config import GenerationConfig
from wanquant.wan.families.family import Family


@dataclass(frozen=True)
class EulerFamily(Family):
    """Configs name the channels of latents and the sides of a patch as these do."""

    solvers: tuple[str, ...] = ("euler",)

    def channels(self, vae: Any) -> int:
        return int(vae["latent_channels"])

    def patch(self, config: Any) -> tuple[int, int, int]:
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def schedule(self, pipe: Any, settings: GenerationConfig) -> None:
        """With the flow shift that is asked for, the same at any size; the checkpoint's own where none is."""
        scheduler = pipe.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            told = f"that of a {type(pipe).__name__} is FlowMatchEulerDiscreteScheduler"
            raise ValueError(f"the pipeline's scheduler is a {type(scheduler).__name__}; {told}")
        asked = {"shift": settings.flow_shift, "use_dynamic_shifting": False}
        if settings.flow_shift is not None and any(scheduler.config[name] != value for name, value in asked.items()):
            pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **asked)
