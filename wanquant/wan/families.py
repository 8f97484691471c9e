"""Families of video models, by their pipeline's class name as ``model_index.json`` has it.

All are of Wan's architecture: the transformer has ``blocks`` and is called with ``hidden_states``, ``timestep`` and
``encoder_hidden_states``; the VAE's config has ``latents_mean`` and ``latents_std``. What else differs is a ``Family``.
Estimates of memory and time take the VAE and the text encoder for Wan's own.

A further family needs no change here: ``register_family("OtherPipeline", Family(...))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from transformers import CLIPVisionModel, UMT5EncoderModel

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
#: Inside a block, a linear and the linear or norm that alone makes its input: smoothing folds there, exactly. The other
#: inputs come from norms without weights, whose modulation blocks share, from a GELU, or from the text.
FOLDS = {"attn1.to_out.0": "attn1.to_v", "attn2.to_out.0": "attn2.to_v", "attn2.to_q": "norm2"}


@dataclass(frozen=True)
class Family:
    """The classes of the pipeline and its parts, the folders it must have (``components``, ``text_encoder``,
    ``transformer`` and ``vae`` among them), by a linear's name inside a block, the module that smoothing may fold into
    (``folds``), and the class of the encoder of pictures (``image_encoder``), where videos start from one: not every
    checkpoint of the family has such an encoder."""

    pipeline: Any
    transformer: Any
    vae: Any = AutoencoderKLWan
    text_encoder: Any = UMT5EncoderModel
    components: tuple[str, ...] = COMPONENTS
    folds: Mapping[str, str] = field(default_factory=lambda: FOLDS)
    image_encoder: Any = None

    @property
    def takes_pictures(self) -> bool:
        return self.image_encoder is not None


WAN = Family(WanPipeline, WanTransformer3DModel)
#: By the class name of the pipeline.
FAMILIES: dict[str, Family] = {
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": replace(WAN, pipeline=WanImageToVideoPipeline, image_encoder=CLIPVisionModel),
}


def register_family(name: str, family: Family) -> None:
    """Makes pipelines whose ``_class_name`` is ``name`` known; ``ValueError`` if the name is taken."""
    if name in FAMILIES:
        raise ValueError(f"the model family {name} is known already")
    alike = family_of(family.transformer.__name__)
    if alike.transformer is family.transformer and alike.folds != family.folds:  # which are found by that class
        raise ValueError(f"the model family {name}: {family.transformer.__name__} is known with other folds")
    FAMILIES[name] = family


def family_of(transformer_class: str | None) -> Family:
    """By the class name of a transformer alone, which has no ``model_index.json``; Wan's where it is not known."""
    return next((f for f in FAMILIES.values() if f.transformer.__name__ == transformer_class), WAN)


def folds_of(transformer: Any) -> Mapping[str, str]:
    """Where smoothing may fold in a transformer, or in two as one (``wanquant.wan.experts``): not into values to which
    a picture's are added before they are read."""
    first = getattr(transformer, "parts", (transformer,))[0]
    folds = family_of(type(first).__name__).folds
    added = getattr(first.config, "added_kv_proj_dim", None) is not None
    return {reader: writer for reader, writer in folds.items() if not (added and writer == "attn2.to_v")}
