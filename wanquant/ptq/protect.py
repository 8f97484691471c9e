"""Which blocks stay BF16: a given list, a rule, or what the calibration data say.

Nothing here imports torch before it is needed, so that a config is checked at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wanquant.choices import check_choices, choice
from wanquant.quant.select import resolve_blocks

if TYPE_CHECKING:
    from wanquant.evaluate.stats import Estimate
    from wanquant.ptq.calibrator import Calibrator
    from wanquant.quant.statistics import Site

LIST, GREEDY = "list", "greedy"
#: (config, number of blocks) to the indices that stay BF16, for rules that need no data.
Rule = Callable[["ProtectConfig", int], list[int]]
#: A row a block with its ``score``, the higher the more it needs protection, from the calibration data.
Measure = Callable[["Calibrator"], list[dict[str, Any]]]
RULES: dict[str, Rule] = {}
MEASURES: dict[str, Measure] = {}
#: What ``protect.by`` may be.
KNOWN = [LIST, GREEDY]


def register_protection(name: str, *, rule: Rule | None = None, measure: Measure | None = None) -> None:
    """Makes ``protect.by=<name>`` known: a ``rule`` that needs no data, or a ``measure`` whose worst blocks are
    protected."""
    if name in KNOWN:
        raise ValueError(f"protect.by={name} is taken")
    if (rule is None) == (measure is None):
        raise ValueError(f"protect.by={name}: give a rule or a measure")
    if rule is not None:
        RULES[name] = rule
    elif measure is not None:
        MEASURES[name] = measure
    KNOWN.insert(-1, name)


@dataclass
class ProtectConfig:
    """``by=list``: ``blocks`` are indices from either end, so that a preset means the same on 30 or 40 blocks.

    Otherwise ``budget`` blocks are chosen: ``middle``, ``random`` (by ``seed``), or from the calibration prompts: the
    largest ``absmax`` or ``kurtosis`` of what enters a block's linears, the least ``block_sqnr`` of its output, the
    greatest ``sensitivity`` of single denoising steps, or ``greedy``, one after the other, each the one that helps most
    beside those before (of the ``candidates`` most sensitive ones; 0 for all).
    Where a pipeline has two transformers (Wan2.2), all of this holds for each of them; what the data choose is chosen
    among the blocks of both, numbered through, and a ``list`` of such numbers wants ``through``.
    ``modules`` are patterns (``re.fullmatch``) of names inside a block, ``ffn.net.2``, that stay BF16 everywhere.
    """

    name: str = "none"
    blocks: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    by: str = choice(LIST, KNOWN)
    budget: int = 5
    seed: int = 0
    candidates: int = 10
    through: bool = False

    @property
    def needs_data(self) -> bool:
        return self.by in MEASURES or self.by == GREEDY


def check_protect(config: ProtectConfig, blocks: int) -> None:
    """``ValueError`` for what no choice could be made by; ``blocks`` are those of a transformer."""
    check_choices(config, "protect.")
    if config.by == LIST:
        return
    if config.through:
        raise ValueError(f"protect.through=true is for a list of blocks, not for protect.by={config.by}")
    if config.blocks:
        raise ValueError(f"protect.by={config.by} chooses the blocks itself: leave protect.blocks empty")
    if not 1 <= config.budget < blocks:
        raise ValueError(f"protect.budget={config.budget}: must lie between 1 and {blocks - 1}")
    if config.by == GREEDY and 0 < config.candidates < config.budget:
        raise ValueError(f"protect.candidates={config.candidates} are fewer than protect.budget={config.budget}")


def by_rule(config: ProtectConfig, blocks: int, transformers: int = 1, beside: Sequence[int] = ()) -> list[int]:
    """The blocks of a list, or of a rule that needs no data; ``blocks`` are those of all transformers. The last of each
    transformer are ``beside`` one of the others each, with which they are protected; none is counted from the end."""
    each = blocks // transformers
    others = each - len(beside)
    if config.by != LIST:
        own = RULES[config.by](config, others)
    elif config.through or (transformers == 1 and not beside):
        return list(config.blocks)
    else:
        own = list(resolve_blocks([i if i >= 0 else i - len(beside) for i in config.blocks], each))
    own = sorted({*own, *(others + place for place, block in enumerate(beside) if block in own)})
    return [first + index for first in range(0, blocks, each) for index in own]


def _middle(config: ProtectConfig, blocks: int) -> list[int]:
    first = (blocks - config.budget) // 2
    return list(range(first, first + config.budget))


def _random(config: ProtectConfig, blocks: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    return sorted(torch.randperm(blocks, generator=generator)[: config.budget].tolist())


def worst(scores: Sequence[float], budget: int) -> list[int]:
    """Indices of the ``budget`` highest scores, sorted; NaN is the worst there is, ties go to the lower index."""
    finite = [math.inf if score != score else score for score in scores]
    return sorted(sorted(range(len(scores)), key=lambda index: (-finite[index], index))[:budget])


@dataclass(frozen=True)
class Choice:
    """``evidence``: a row a block with its ``score``, the higher the more it needs protection; of the greedy search a
    row a round. Empty where no data were used."""

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
    rows = MEASURES[config.by](calibrator)
    chosen = worst([row["score"] for row in rows], config.budget * calibrator.transformers)
    return Choice(config.by, chosen, [{"block": index, **row} for index, row in enumerate(rows)])


def by_absmax(calibrator: Calibrator) -> list[dict[str, Any]]:
    """The largest magnitude that enters any linear of the block, but for the text, which all blocks read."""
    inputs = _own_inputs(calibrator, full=False)
    return [{"score": _largest([site.largest() for site in sites])} for sites in inputs]


def by_kurtosis(calibrator: Calibrator) -> list[dict[str, Any]]:
    """The largest kurtosis of what enters any linear of the block, but for the text."""
    inputs = _own_inputs(calibrator, full=True)
    return [{"score": _largest([site.view().kurtosis for site in sites])} for sites in inputs]


def _largest(values: Sequence[float]) -> float:
    """NaN if one of them is, which Python's maximum may lose."""
    return math.nan if any(map(math.isnan, values)) else max(values)


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


def _below(estimate: Estimate) -> dict[str, Any]:
    """A low SQNR is a high score."""
    return {"score": -estimate.mean, "sqnr": estimate.mean, "ci95": [estimate.low, estimate.high]}


def _greedy(config: ProtectConfig, calibrator: Calibrator) -> Choice:
    """Protects, one after the other, the block whose protection leaves the least error beside those before it."""
    candidates = list(range(calibrator.blocks))
    if config.candidates:
        scores = [row["score"] for row in by_sensitivity(calibrator)]
        candidates = worst(scores, config.candidates * calibrator.transformers)
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


register_protection("middle", rule=_middle)
register_protection("random", rule=_random)
register_protection("sensitivity", measure=by_sensitivity)
register_protection("absmax", measure=by_absmax)
register_protection("kurtosis", measure=by_kurtosis)
register_protection("block_sqnr", measure=by_block_sqnr)
