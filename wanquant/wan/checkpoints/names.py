"""Wan checkpoints as its authors publish them: their names of the same tensors, and their ``config.json``.

Both name the same text-to-video transformer (github.com/Wan-Video/Wan2.1, ``wan/modules/model.py``, and diffusers'
``WanTransformer3DModel``); no tensor is split, joined or turned. Single files may have either's names behind a prefix,
and say by their tensors' shapes what a ``config.json`` would.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Theirs and diffusers', inside an attention, a block (their ``norm3`` is the affine norm before cross attention), and
#: outside of the blocks.
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
REST = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
#: What ComfyUI's files put before the names.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
#: Attention heads and blocks by the model's width: the published models. A shape says nothing of the heads.
PUBLISHED = {1536: (12, 30), 3072: (24, 30), 5120: (40, 40)}
#: Tensors whose shapes tell a config, by diffusers' names.
TELLING = (
    *("patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight"),
    *(f"condition_embedder.{name}_embedder.linear_1.weight" for name in ("text", "time")),
)


def is_original(name: str) -> bool:
    """Whether a tensor's name is one that only the authors' naming has."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return len(parts) > 2 and parts[2] in ("self_attn", "cross_attn")
    return parts[0] in ("head", "time_projection")


def is_wans(name: str) -> bool:
    """Whether it is diffusers' name of a tensor that text-to-video Wan has."""
    return _translated(name, *_turned()) is not None


@dataclass(frozen=True)
class Naming:
    """How a checkpoint calls its tensors: by the authors' names or by diffusers', behind a prefix or none."""

    prefix: str
    original: bool

    @classmethod
    def of(cls, names: Collection[str]) -> Naming:
        prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in names)), "")
        return cls(prefix, any(is_original(name.removeprefix(prefix)) for name in names))

    def ours(self, name: str) -> str | None:
        """diffusers' name of a tensor; None if it has none. With diffusers' naming any name is taken for one."""
        if not name.startswith(self.prefix):
            return None
        bare = name.removeprefix(self.prefix)
        return _translated(bare, BLOCK, REST) if self.original else bare

    def theirs(self, name: str) -> str:
        """The checkpoint's name of a tensor that diffusers calls so."""
        translated = _translated(name, *_turned()) if self.original else None
        return self.prefix + (translated or name)


def to_diffusers(name: str) -> str:
    """diffusers' name of a tensor; ``ValueError`` for one that text-to-video Wan does not have."""
    found = _translated(name, BLOCK, REST)
    if found is None:
        raise ValueError(f"tensor {name} is none of text-to-video Wan's")
    return found


def to_original(name: str) -> str:
    """The authors' name of a tensor or module that diffusers calls so; ``ValueError`` for one they do not have."""
    found = _translated(name, *_turned())
    if found is None:
        raise ValueError(f"{name} has no name among the authors'")
    return found


def _turned() -> list[dict[str, str]]:
    """Of blocks and the rest, from diffusers' names to theirs."""
    return [{ours: theirs for theirs, ours in table.items()} for table in (BLOCK, REST)]


def _translated(name: str, block: dict[str, str], rest: dict[str, str]) -> str | None:
    """By the tables, of a module or of one of its tensors; None if they have it not."""
    parts = name.split(".")
    prefix, inside, table = ([], parts, rest)
    if parts[0] == "blocks" and len(parts) > 2:
        prefix, inside, table = parts[:2], parts[2:], block
    for module, tensor in ((inside, []), (inside[:-1], inside[-1:])):
        if ".".join(module) in table:
            return ".".join([*prefix, table[".".join(module)], *tensor])
    return None


def is_original_config(described: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is the authors'; some of theirs have no class name."""
    return bool(described.get("_class_name", "WanModel" if "dim" in described else "") == "WanModel")


def config_to_diffusers(theirs: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a ``WanModel`` as one of diffusers'; ``ValueError`` for another kind of model."""
    if theirs.get("model_type", "t2v") != "t2v":
        raise ValueError(f"model_type {theirs['model_type']}: only text-to-video is known here")
    missing = [key for key in ("dim", "ffn_dim", "num_heads", "num_layers") if key not in theirs]
    if missing:
        raise ValueError(f"its config.json has no {missing[0]}")
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": theirs["num_heads"],
        "attention_head_dim": theirs["dim"] // theirs["num_heads"],
        "num_layers": theirs["num_layers"],
        "ffn_dim": theirs["ffn_dim"],
        "freq_dim": theirs.get("freq_dim", 256),
        "in_channels": theirs.get("in_dim", 16),
        "out_channels": theirs.get("out_dim", 16),
        "text_dim": theirs.get("text_dim", 4096),
        "eps": theirs.get("eps", 1e-6),
        "patch_size": theirs.get("patch_size", [1, 2, 2]),
        "cross_attn_norm": theirs.get("cross_attn_norm", True),
        "qk_norm": "rms_norm_across_heads" if theirs.get("qk_norm", True) else None,
    }


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], alike: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The config of the text-to-video Wan that has tensors of these shapes, ``TELLING`` among them.

    The heads, and how many blocks there have to be, are those of the first of the diffusers configs ``alike`` that is
    as wide, or of the published model of that width; ``ValueError`` if there is none."""
    patch, out, ffn, text, time = (shapes[name] for name in TELLING)
    width = patch[0]
    known = next((c for c in alike if c["num_attention_heads"] * c["attention_head_dim"] == width), None)
    if known is None and width not in PUBLISHED:
        raise ValueError(
            f"it is {width} wide, as no published Wan, and no shape tells its attention heads: put its config.json "
            f"beside it, or give a model.base of that width"
        )
    heads, blocks = (known["num_attention_heads"], known["num_layers"]) if known else PUBLISHED[width]
    return {
        **{key: known[key] for key in ("eps", "rope_max_seq_len") if known and key in known},
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": blocks,
        "ffn_dim": ffn[0],
        "freq_dim": time[1],
        "in_channels": patch[1],
        "out_channels": out[0] // math.prod(patch[2:]),
        "text_dim": text[1],
        "patch_size": list(patch[2:]),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
    }
