"""Settings that take one of a few words, and what a misspelt word may have been meant to be.

A config dataclass declares such a field with ``choice``; ``check_choices`` then refuses any other value, naming the
key, the nearest word and all there are. It imports nothing, so that a mistake is answered at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import field, fields, is_dataclass
from typing import Any

#: Likeness (``difflib``'s ratio, 0 to 1) below which a word is no guess.
ALIKE = 0.6


def choice(default: str, known: Collection[str]) -> Any:
    """A dataclass field that takes one of the ``known`` words, also of those that ``known`` comes to hold later."""
    return field(default=default, metadata={"choices": known})


def check_choices(config: Any, path: str = "") -> None:
    """``ValueError`` names the first field of ``config``, or of a dataclass inside, whose value is not one of its
    choices. ``path`` is the key that ``config`` itself has, with a dot behind it."""
    for each in fields(config):
        value, key = getattr(config, each.name), f"{path}{each.name}"
        if is_dataclass(value):
            check_choices(value, f"{key}.")
        elif "choices" in each.metadata and value not in each.metadata["choices"]:
            raise mistaken(key, value, each.metadata["choices"])


def mistaken(key: str, value: Any, known: Collection[str]) -> ValueError:
    """The error for a value that is none of the ``known`` ones."""
    return ValueError(f"{key}={value}: {did_you_mean(str(value), known)}choose {', '.join(known)}")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``did you mean X? `` with a space behind it, or nothing where no known word is like this one. Those that begin
    with it are all named."""
    longer = [each for each in known if each.startswith(f"{word}_")]
    if len(longer) > 1:
        return f"did you mean {', '.join(longer[:-1])} or {longer[-1]}? "
    found = nearest(word, known)
    return f"did you mean {found}? " if found else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word, or dotted key, that is most like this one. Keys are compared whole and by their last part, so
    that ``sedes`` is like ``prompts.seeds``."""
    word = word.lower()

    def likeness(other: str) -> float:
        other = other.lower()
        whole = difflib.SequenceMatcher(None, word, other).ratio()
        last = difflib.SequenceMatcher(None, word.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return whole if "." in word else max(whole, 0.95 * last)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= ALIKE else None
