"""The (prompt, seed) pairs a comparison is made on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from wanquant.choices import mistaken
from wanquant.runs.files import sum_of_file
from wanquant.wan.config import Picture
from wanquant.wan.tiny import parse_caption

if TYPE_CHECKING:
    from wanquant.wan.cached import Pair

#: The prompts a run was made with, and the name of their evaluation.
OWN = "own"
#: Seeds of VBench's standard, and the most its standard mode looks for.
STANDARD_SEEDS = 5


@dataclass
class PromptsConfig:
    """Every prompt with every seed. ``by_language`` holds the same list for each kind of model;
    ``texts`` is the one in use and can be given freely, ``prompts.texts=["a red circle ..."]``, or from a ``file``, a
    prompt a line.

    ``official`` takes VBench's own list instead, of all ``dimensions`` or of some, and of each no more than ``first``
    prompts, where that is not 0. ``images`` are the first frames for an image-to-video model, a file a text.
    """

    name: str = "demo5"
    by_language: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    file: str = ""
    official: bool = False
    dimensions: list[str] = field(default_factory=list)
    first: int = 0
    images: list[str] = field(default_factory=list)


def settled(config: PromptsConfig) -> PromptsConfig:
    """With the texts that it says where to find."""
    if config.file:
        return replace(config, texts=_lines(Path(config.file)), file="")
    return replace(config, texts=official_texts(config), dimensions=[], first=0) if config.official else config


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts.file={path}: {error}") from None
    return [line for line in lines if line]


def pairs(config: PromptsConfig, group: str = "prompts") -> list[Pair]:
    """``ValueError`` where there is nothing to generate, or the same thing twice."""
    if not config.official and (config.first or config.dimensions):
        raise ValueError(f"{group}.first and {group}.dimensions choose from VBench's list (prompts=vbench): give texts")
    texts = settled(config).texts
    if not texts:
        raise ValueError(f"{group}.texts is empty: give at least one prompt")
    if not config.seeds:
        raise ValueError(f"{group}.seeds is empty: give at least one seed")
    for name, values in (("texts", texts), ("seeds", config.seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"{group}.{name} holds a value twice")
    if not all(0 <= seed < 2**63 for seed in config.seeds):
        raise ValueError(f"{group}.seeds must lie between 0 and 2^63")
    if config.official and not all(seed < STANDARD_SEEDS for seed in config.seeds):
        raise ValueError(f"{group}.seeds: VBench's standard has the seeds 0 to {STANDARD_SEEDS - 1}")
    return [(text, seed) for text in texts for seed in config.seeds]


def pictures(config: PromptsConfig, taken: bool, group: str = "prompts", needed: bool = True) -> dict[str, Picture]:
    """First frames or references by text; ``ValueError`` where the model is one that has them ``taken`` and they are
    not there, unless they are not ``needed``, and where it is not and they are."""
    texts = settled(config).texts
    if not taken or not (config.images or needed):
        if config.images:
            raise ValueError(f"{group}.images: this model makes videos from text alone, leave the pictures out")
        return {}
    if len(config.images) != len(texts):
        told = f"{group}.images has {len(config.images)} pictures for {len(texts)} texts"
        raise ValueError(f"{told}: give the first frame of each text, in their order")
    found = {}
    for text, path in zip(texts, map(Path, config.images), strict=True):
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            told = getattr(error, "strerror", None) or "it is no picture that can be read"
            raise ValueError(f"{group}.images: {path}: {told}") from None
        found[text] = Picture(path.resolve(), sum_of_file(path))
    return found


def is_picture(picture: Picture) -> bool:
    """Whether its file is there, and what it was."""
    return picture.path.is_file() and sum_of_file(picture.path) == picture.sha256


def check_captions(texts: Iterable[str], language: str) -> None:
    """``ValueError`` for a prompt that tiny-wan's grammar does not have, where the model understands no other."""
    for text in texts if language == "scenes" else ():
        parse_caption(text)


def following(seeds: list[int]) -> dict[int, int]:
    """With which other seed each is compared; of two, each prompt's pair counts once. Empty for a single one."""
    found = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True)) if len(seeds) > 1 else {}
    if len(seeds) == 2:
        del found[seeds[1]]
    return found


def official_texts(config: PromptsConfig) -> list[str]:
    """Of the dimensions asked for, in VBench's order, each text once."""
    by_dimension = official_prompts()
    if set(config.texts) - {text for texts in by_dimension.values() for text in texts}:
        raise ValueError("prompts.official takes VBench's own texts: leave prompts.texts empty")
    if config.texts:
        return config.texts
    for name in config.dimensions:
        if name not in by_dimension:
            raise mistaken("prompts.dimensions", name, sorted(by_dimension))
    chosen = [by_dimension[name] for name in config.dimensions or by_dimension]
    wanted = {text for texts in chosen for text in (texts[: config.first] if config.first else texts)}
    return [text for text in dict.fromkeys(text for texts in by_dimension.values() for text in texts) if text in wanted]


def official_prompts() -> dict[str, list[str]]:
    """Dimension to the prompts VBench judges it on; from the file in its package, which is not imported."""
    listed: dict[str, list[str]] = {}
    for entry in json.loads((vbench_folder() / "VBench_full_info.json").read_text(encoding="utf-8")):
        for dimension in entry["dimension"]:
            texts = listed.setdefault(dimension, [])
            if entry["prompt_en"] not in texts:
                texts.append(entry["prompt_en"])
    return listed


def vbench_folder() -> Path:
    """Of its package."""
    found = importlib.util.find_spec("vbench")
    if found is None or found.origin is None:
        raise ValueError("prompts=vbench is the list that comes with VBench, which is not installed")
    return Path(found.origin).parent
