"""Which model, and how to ask it for a video."""

from __future__ import annotations

from dataclasses import dataclass, field

from wanquant.wan.generate import GenerationConfig
from wanquant.wan.outliers import OutliersConfig


@dataclass
class ModelConfig:
    """``path`` is ``tiny``, a folder in diffusers layout, or a hub id; ``language`` is what it understands:
    ``scenes`` (the captions of ``wanquant.wan.tiny``) or ``english``."""

    name: str = "tiny"
    path: str = "tiny"
    device: str = "auto"
    language: str = "scenes"
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    #: Videos denoised together: quick for a small model. Products round as those of such a batch.
    batch: int = 1
    #: Planted after loading; none by default.
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
