"""Which blocks stay BF16: a given list, a rule, or what the data say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from wanquant.choices import check_choices, choice
from wanquant.quant.select import resolve_blocks

#: Rules that need no data; measures of a block by which the worst are protected; and the search.
RULES = ("list", "middle", "random")
MEASURES = ("sensitivity", "absmax", "kurtosis", "block_sqnr")
GREEDY = "greedy"


@dataclass
class ProtectConfig:
    """``by=list``: ``blocks`` are indices from either end, so that a preset means the same on 30 or 40 blocks.

    Otherwise ``budget`` blocks are chosen: ``middle``, ``random`` (by ``seed``), or from the calibration prompts: the
    largest ``absmax`` or ``kurtosis`` of what enters a block's linears, the least ``block_sqnr`` of its output, the
    greatest ``sensitivity`` of the final latents, or ``greedy``, one after the other, each the one that helps most
    beside those before (of the ``candidates`` most sensitive ones; 0 for all).
    Where a pipeline has two transformers (Wan2.2), all of this holds for each of them; what the data choose is chosen
    among the blocks of both, numbered through, and a ``list`` of such numbers wants ``through``.
    ``modules`` are patterns (``re.fullmatch``) of names inside a block, ``ffn.net.2``, that stay BF16 everywhere.
    """

    name: str = "none"
    blocks: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    by: str = choice("list", (*RULES, *MEASURES, GREEDY))
    budget: int = 5
    seed: int = 0
    candidates: int = 10
    through: bool = False


def check_protect(config: ProtectConfig, blocks: int) -> None:
    """``ValueError`` for what no choice could be made by; ``blocks`` are those of a transformer."""
    check_choices(config, "protect.")
    if config.by == "list":
        return
    if config.through:
        raise ValueError(f"protect.through=true is for a list of blocks, not for protect.by={config.by}")
    if config.blocks:
        raise ValueError(f"protect.by={config.by} chooses the blocks itself: leave protect.blocks empty")
    if not 1 <= config.budget < blocks:
        raise ValueError(f"protect.budget={config.budget}: must lie between 1 and {blocks - 1}")
    if config.by == GREEDY and 0 < config.candidates < config.budget:
        raise ValueError(f"protect.candidates={config.candidates} are fewer than protect.budget={config.budget}")


def by_rule(config: ProtectConfig, blocks: int, transformers: int = 1) -> list[int]:
    """The blocks of a rule that needs no data; ``blocks`` are those of all transformers."""
    each = blocks // transformers
    if config.by == "middle":
        first = (each - config.budget) // 2
        own = list(range(first, first + config.budget))
    elif config.by == "random":
        import torch  # here, so that a config can be read without it

        generator = torch.Generator().manual_seed(config.seed)
        own = sorted(torch.randperm(each, generator=generator)[: config.budget].tolist())
    elif config.through or transformers == 1:
        return list(config.blocks)
    else:
        own = list(resolve_blocks(config.blocks, each))
    return [first + index for first in range(0, blocks, each) for index in own]


def worst(scores: Sequence[float], budget: int) -> list[int]:
    """Indices of the ``budget`` highest scores, sorted; NaN is the worst there is, ties go to the lower index."""
    finite = [math.inf if score != score else score for score in scores]
    return sorted(sorted(range(len(scores)), key=lambda index: (-finite[index], index))[:budget])
