"""Wan checkpoints as its authors publish them: their names of the same tensors, and their ``config.json``.

Both name the same text-to-video transformer (github.com/Wan-Video/Wan2.1, ``wan/modules/model.py``, and diffusers'
``WanTransformer3DModel``); no tensor is split, joined or turned.
"""

from __future__ import annotations

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


def is_original(name: str) -> bool:
    """Whether a tensor's name is one that only the authors' naming has."""
    parts = name.split(".")
    return parts[0] in ("head", "time_projection") or (parts[0] == "blocks" and parts[2] in ("self_attn", "cross_attn"))


def to_diffusers(name: str) -> str:
    """diffusers' name of a tensor; ``ValueError`` for one that text-to-video Wan does not have."""
    found = _translated(name, BLOCK, REST)
    if found is None:
        raise ValueError(f"tensor {name} is none of text-to-video Wan's")
    return found


def to_original(name: str) -> str:
    """The authors' name of a tensor or module that diffusers calls so; ``ValueError`` for one they do not have."""
    block, rest = ({ours: theirs for theirs, ours in table.items()} for table in (BLOCK, REST))
    found = _translated(name, block, rest)
    if found is None:
        raise ValueError(f"{name} has no name among the authors'")
    return found


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
