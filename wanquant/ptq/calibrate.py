"""Calibration: one BF16 pass over prompts of its own, with observers on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from wanquant.quant import ConversionReport
from wanquant.quant.observe import ActivationObserver
from wanquant.wan.generate import GenerationConfig, generate
from wanquant.wan.load import Pipeline


@dataclass(frozen=True)
class Calibration:
    """Largest magnitudes met: by linear (of its input) and by block (of the residual stream behind it),
    the share of the transformer's linear FLOPs each linear has, and how much was seen."""

    input_absmax: dict[str, float]
    block_absmax: dict[int, float]
    flops: dict[str, int]
    videos: int
    steps: int

    def fraction_of_flops(self, report: ConversionReport) -> float:
        """Share of the multiply-adds of all linears that the converted ones do, tokens counted as run."""
        return sum(self.flops[name] for name in report.names("converted")) / sum(self.flops.values())


def calibrate(
    pipe: Pipeline, pairs: list[tuple[str, int]], settings: GenerationConfig, on_step: Callable[[], None]
) -> Calibration:
    """Denoises the calibration prompts in BF16; the VAE is not run. Runs over guidance branches and all steps."""
    with ActivationObserver(pipe.transformer) as observer:
        generate(pipe, pairs, settings, on_step, decode=False)
    flops = {}
    for name, rows in observer.rows.items():
        linear = pipe.transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        flops[name] = 2 * rows * linear.in_features * linear.out_features
    return Calibration(observer.input_absmax, observer.block_absmax, flops, len(pairs), settings.steps)
