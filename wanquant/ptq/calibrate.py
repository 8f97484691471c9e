"""Calibration: one BF16 pass over prompts of its own, with observers on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from wanquant.quant import ConversionReport
from wanquant.quant.statistics import Layout, Observer, Statistics
from wanquant.wan.cached import Pair
from wanquant.wan.config import GenerationConfig
from wanquant.wan.experts import whole_of
from wanquant.wan.generate import Embed, Position, generate
from wanquant.wan.load import Pipeline


@dataclass(frozen=True)
class Calibration:
    """What passed, and the share of the transformer's linear FLOPs each linear has, tokens counted as run."""

    statistics: Statistics
    flops: dict[str, int]

    def fraction_of_flops(self, report: ConversionReport) -> float:
        """Share of the multiply-adds of all linears that the converted ones do."""
        return sum(self.flops[name] for name in report.names("converted")) / sum(self.flops.values())


def name_of(pair: Pair) -> str:
    """A video in statistics: its seed and prompt."""
    return f"{pair[1]} {pair[0]}"


def calibrate(
    pipe: Pipeline,
    pairs: list[Pair],
    settings: GenerationConfig,
    on_step: Callable[[], None],
    bins: int = 4,
    full: bool = True,
    embed: Embed | None = None,
) -> Calibration:
    """Denoises the calibration prompts in BF16; the VAE is not run. Both guidance branches and all steps are seen."""
    layout = Layout(tuple(map(name_of, pairs)), settings.steps, bins, settings.branches, full)
    position = Position()
    with Observer(whole_of(pipe), layout, position.where) as observer:
        generate(pipe, pairs, settings, on_step, decode=False, position=position, embed=embed)
    return Calibration(observer.statistics, linear_flops(pipe, observer.statistics.rows()))


def linear_flops(pipe: Pipeline, rows: dict[str, int]) -> dict[str, int]:
    """Multiplications and additions of each linear for the rows it was given."""
    flops, whole = {}, whole_of(pipe)
    for name, count in rows.items():
        linear = whole.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        flops[name] = 2 * count * linear.in_features * linear.out_features
    return flops
