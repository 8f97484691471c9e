"""Protection chosen by the data: which blocks, by which evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanquant.evaluate.stats import Estimate
from wanquant.ptq.bench import Bench
from wanquant.ptq.protect import GREEDY, ProtectConfig, worst
from wanquant.quant.statistics import Site


@dataclass(frozen=True)
class Choice:
    """``evidence``: a row a block with its ``score``, the higher the more it needs protection; of the greedy search a
    row a round. Empty where no data were asked."""

    by: str
    blocks: list[int]
    evidence: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return {"by": self.by, "evidence": self.evidence}


def choose(config: ProtectConfig, by_rule: Sequence[int] | None, bench: Bench) -> Choice:
    """The blocks that a rule without data has found, or by ``config.by`` with the calibration prompts of the bench."""
    if by_rule is not None:
        return Choice(config.by, list(by_rule), [])
    if config.by == GREEDY:
        return _greedy(config, bench)
    rows = SCORES[config.by](bench)
    chosen = worst([row["score"] for row in rows], config.budget * bench.transformers)
    return Choice(config.by, chosen, [{"block": index, **row} for index, row in enumerate(rows)])


def by_absmax(bench: Bench) -> list[dict[str, Any]]:
    """The largest magnitude that enters any linear of the block, but for the text, which all blocks read."""
    # numpy's maximum keeps a NaN, which Python's may lose.
    return [{"score": float(np.max([site.largest() for site in sites]))} for sites in _own_inputs(bench, False)]


def by_kurtosis(bench: Bench) -> list[dict[str, Any]]:
    """The largest kurtosis of what enters any linear of the block, but for the text."""
    return [{"score": float(np.max([site.view().kurtosis for site in sites]))} for sites in _own_inputs(bench, True)]


def _own_inputs(bench: Bench, full: bool) -> list[list[Site]]:
    """By block, of the linears that would be quantized."""
    statistics = bench.calibration(full=full or None).statistics
    found = []
    for index in range(bench.blocks):
        sites = statistics.own_inputs(index)
        inside = {name: name.removeprefix(f"blocks.{index}.") for name in sites}
        kept = [name for name in sites if not any(re.fullmatch(m, inside[name]) for m in bench.modules)]
        found.append([sites[name] for name in kept or sites])
    return found


def by_block_sqnr(bench: Bench) -> list[dict[str, Any]]:
    return [_below(estimate) for estimate in bench.block_errors()]


def by_sensitivity(bench: Bench) -> list[dict[str, Any]]:
    units = [f"block {index}" for index in range(bench.blocks)]
    found = bench.unit_errors(units)
    return [_below(found[unit]) for unit in units]


SCORES = {
    "absmax": by_absmax,
    "kurtosis": by_kurtosis,
    "block_sqnr": by_block_sqnr,
    "sensitivity": by_sensitivity,
}


def _below(estimate: Estimate) -> dict[str, Any]:
    """A low SQNR is a high score."""
    return {"score": -estimate.mean, "sqnr": estimate.mean, "ci95": [estimate.low, estimate.high]}


def _greedy(config: ProtectConfig, bench: Bench) -> Choice:
    """Protects, one after the other, the block whose protection leaves the least error beside those before it."""
    candidates = list(range(bench.blocks))
    if config.candidates:
        candidates = worst([row["score"] for row in by_sensitivity(bench)], config.candidates * bench.transformers)
    chosen: list[int] = []
    evidence = []
    for _ in range(config.budget * bench.transformers):
        sets = {block: tuple(sorted([*chosen, block])) for block in candidates if block not in chosen}
        found = bench.protected_errors(list(sets.values()))
        tried = [{"block": block, **_below(found[blocks])} for block, blocks in sets.items()]
        best = min(tried, key=lambda row: (math.isnan(row["score"]), row["score"], row["block"]))
        chosen.append(best["block"])
        evidence.append({"round": len(chosen), **best, "tried": tried})
    return Choice(GREEDY, sorted(chosen), evidence)
