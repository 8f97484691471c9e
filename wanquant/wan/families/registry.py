"""The known families, by their pipeline's class name as ``model_index.json`` has it.

A further family needs no change here: ``register_family("OtherPipeline", Family(...))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from transformers import CLIPVisionModel

from wanquant.wan.families.family import Family
from wanquant.wan.families.hunyuan import HUNYUAN
from wanquant.wan.families.ltx import LTX
from wanquant.wan.families.vace import VACE

WAN = Family(WanPipeline, WanTransformer3DModel)
#: By the class name of the pipeline.
FAMILIES: dict[str, Family] = {
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": replace(WAN, pipeline=WanImageToVideoPipeline, image_encoder=CLIPVisionModel),
    "WanVACEPipeline": VACE,
    "LTXPipeline": LTX,
    "HunyuanVideoPipeline": HUNYUAN,
}


def register_family(name: str, family: Family) -> None:
    """Makes pipelines whose ``_class_name`` is ``name`` known; ``ValueError`` if the name is taken."""
    if name in FAMILIES:
        raise ValueError(f"the model family {name} is known already")
    own = family.pipeline.__name__
    if own != name and own in FAMILIES:  # by its class a loaded pipeline's family is found
        raise ValueError(
            f"the model family {name}: the pipeline class {own} is that of another, give it one of its own"
        )
    alike = family_of(family.transformer.__name__)
    if alike.transformer is family.transformer:  # by that class these are found
        for what in ("folds", "block_lists"):
            if getattr(alike, what) != getattr(family, what):
                raise ValueError(f"the model family {name}: {family.transformer.__name__} is known with other {what}")
    FAMILIES[name] = family


def family_of(transformer_class: str | None) -> Family:
    """By the class name of a transformer alone, which has no ``model_index.json``; Wan's where it is not known."""
    return next((f for f in FAMILIES.values() if f.transformer.__name__ == transformer_class), WAN)


def family_of_pipe(pipe: Any) -> Family:
    return FAMILIES.get(type(pipe).__name__) or family_of(type(pipe.transformer).__name__)


def block_names(transformer: Any) -> list[str]:
    """Of the blocks in the order they run: ``blocks.0`` and so on, or whatever the transformer's lists are named."""
    lists = family_of(type(transformer).__name__).block_lists
    return [f"{name}.{place}" for name in lists for place in range(len(getattr(transformer, name)))]


def block_of(name: str, transformer: Any) -> int | None:
    """The number of the block that a tensor or module of this name is in, if it is in one."""
    start = ".".join(name.split(".")[:2])
    names = block_names(transformer)
    return names.index(start) if start in names else None


def folds_of(transformer: Any) -> Mapping[str, str]:
    """Where smoothing may fold in a transformer, or in two as one (``wanquant.wan.experts``): not into values to which
    a picture's are added before they are read."""
    first = getattr(transformer, "parts", (transformer,))[0]
    folds = family_of(type(first).__name__).folds
    added = getattr(first.config, "added_kv_proj_dim", None) is not None
    return {reader: writer for reader, writer in folds.items() if not (added and writer == "attn2.to_v")}
