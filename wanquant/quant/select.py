"""Which blocks and modules: blocks by index from either end, modules by whole-name patterns.

Never by substring: ``blocks.1`` is not ``blocks.10``. A selector that matches nothing is an error,
because a protection that protects nothing is the kind of mistake no result shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def resolve_blocks(indices: Sequence[int], count: int, what: str = "protected") -> tuple[int, ...]:
    """Indices from either end to sorted positions 0..count-1; ``ValueError`` names one out of range or given twice."""
    resolved: dict[int, int] = {}
    for index in indices:
        if not -count <= index < count:
            raise ValueError(
                f"{what} block {index} is out of range: the model has {count} blocks, {-count} to {count - 1}"
            )
        position = index % count
        if position in resolved:
            raise ValueError(f"{what} blocks {resolved[position]} and {index} are the same of {count} blocks")
        resolved[position] = index
    return tuple(sorted(resolved))


def match_names(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The names that one of the patterns matches whole (``re.fullmatch``; a dot also matches a dot).

    ``ValueError`` names a pattern that is no regular expression or matches nothing.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} of protected modules is not a regular expression: {error}") from None
        if not hits:
            raise ValueError(
                f"pattern {pattern!r} of protected modules matches nothing (a whole name has to match: attn1.* and not "
                f"attn1): the names are {', '.join(sorted(set(names)))}"
            )
        found |= hits
    return found
