"""What of an evaluation's config can be refused before a model is read."""

from __future__ import annotations

from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges import perceptual, vbench


def check_eval(config: EvalConfig) -> None:
    """Refuses what can be refused before a model is read: dimensions, packages, weights."""
    vbench.check_dimensions(config.dimensions)
    perceptual.settled(config.lpips)
    vbench.prepare(config.dimensions, config.foreign_weights)
