"""The (prompt, seed) pairs a comparison is made on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PromptsConfig:
    """Every prompt with every seed. ``by_language`` holds the same list for each kind of model;
    ``texts`` is the one in use and can be given freely: ``prompts.texts=["a red circle ..."]``."""

    name: str = "demo5"
    by_language: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])


def pairs(config: PromptsConfig, group: str = "prompts") -> list[tuple[str, int]]:
    """``ValueError`` where there is nothing to generate, or the same thing twice."""
    if not config.texts:
        raise ValueError(f"{group}.texts is empty: give at least one prompt")
    if not config.seeds:
        raise ValueError(f"{group}.seeds is empty: give at least one seed")
    for name, values in (("texts", config.texts), ("seeds", config.seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"{group}.{name} holds a value twice")
    if not all(0 <= seed < 2**63 for seed in config.seeds):
        raise ValueError(f"{group}.seeds must lie between 0 and 2^63")
    return [(text, seed) for text in config.texts for seed in config.seeds]


@dataclass
class EvalConfig:
    """``noise_floor``: also compare BF16 with itself, other seeds and initial noise moved by one unit
    in the last place; costs one more BF16 video a pair, and with a single seed two."""

    name: str = "fidelity"
    noise_floor: bool = True
