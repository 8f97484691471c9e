"""Protection chosen by the data: which blocks, by which evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanquant.evaluate.stats import Estimate
from wanquant.ptq.calibrator import Calibrator
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


def choose(config: ProtectConfig, by_rule: Sequence[int] | None, calibrator: Calibrator) -> Choice:
    """The blocks that a rule without data has found, or those found by ``config.by`` on the calibration prompts."""
    if by_rule is not None:
        return Choice(config.by, list(by_rule), [])
    if config.by == GREEDY:
        return _greedy(config, calibrator)
    rows = SCORES[config.by](calibrator)
    chosen = worst([row["score"] for row in rows], config.budget * calibrator.transformers)
    return Choice(config.by, chosen, [{"block": index, **row} for index, row in enumerate(rows)])


def by_absmax(calibrator: Calibrator) -> list[dict[str, Any]]:
    """The largest magnitude that enters any linear of the block, but for the text, which all blocks read."""
    # numpy's maximum keeps a NaN, which Python's may lose.
    return [{"score": float(np.max([site.largest() for site in sites]))} for sites in _own_inputs(calibrator, False)]


def by_kurtosis(calibrator: Calibrator) -> list[dict[str, Any]]:
    """The largest kurtosis of what enters any linear of the block, but for the text."""
    return [
        {"score": float(np.max([site.view().kurtosis for site in sites]))} for sites in _own_inputs(calibrator, True)
    ]


def _own_inputs(calibrator: Calibrator, full: bool) -> list[list[Site]]:
    """By block, of the linears that would be quantized."""
    statistics = calibrator.calibration(full=full or None).statistics
    found = []
    for index in range(calibrator.blocks):
        sites = statistics.own_inputs(index)
        inside = {name: name.removeprefix(f"blocks.{index}.") for name in sites}
        kept = [name for name in sites if not any(re.fullmatch(m, inside[name]) for m in calibrator.modules)]
        found.append([sites[name] for name in kept or sites])
    return found


def by_block_sqnr(calibrator: Calibrator) -> list[dict[str, Any]]:
    return [_below(estimate) for estimate in calibrator.block_errors()]


def by_sensitivity(calibrator: Calibrator) -> list[dict[str, Any]]:
    units = [f"block {index}" for index in range(calibrator.blocks)]
    found = calibrator.unit_errors(units)
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


def _greedy(config: ProtectConfig, calibrator: Calibrator) -> Choice:
    """Protects, one after the other, the block whose protection leaves the least error beside those before it."""
    candidates = list(range(calibrator.blocks))
    if config.candidates:
        candidates = worst(
            [row["score"] for row in by_sensitivity(calibrator)], config.candidates * calibrator.transformers
        )
    chosen: list[int] = []
    evidence = []
    for _ in range(config.budget * calibrator.transformers):
        sets = {block: tuple(sorted([*chosen, block])) for block in candidates if block not in chosen}
        found = calibrator.protected_errors(list(sets.values()))
        tried = [{"block": block, **_below(found[blocks])} for block, blocks in sets.items()]
        best = min(tried, key=lambda row: (math.isnan(row["score"]), row["score"], row["block"]))
        chosen.append(best["block"])
        evidence.append({"round": len(chosen), **best, "tried": tried})
    return Choice(GREEDY, sorted(chosen), evidence)
