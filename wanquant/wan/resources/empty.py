"""Models without weights, on the meta device, and what they are given: what memory and time are predicted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanquant.quant.convert import empty_like_quantized_
from wanquant.quant.scheme import Scheme
from wanquant.wan.checkpoints.checkpoint import FLOAT32, kept_in_fp32, read_json
from wanquant.wan.config import GenerationConfig
from wanquant.wan.families import FAMILIES, PICTURE_TOKENS, WAN, Family, block_names

#: Latents are so many times smaller in time, and, unless the VAE's config says otherwise, in height and width.
IN_TIME, IN_SPACE = 4, 8


@dataclass(frozen=True)
class Given:
    """What a pipeline gives its transformer and the transformer's config does not tell: how many times smaller latents
    are (``in_space`` and ``in_time``), whether a timestep comes with each token (Wan2.2-TI2V), whether videos start
    from a picture."""

    in_space: int = IN_SPACE
    timestep_per_token: bool = False
    picture: bool = False
    in_time: int = IN_TIME
    family: Family = WAN

    @staticmethod
    def of(folder: Path) -> Given:
        """Of a pipeline's folder; a transformer's own does not tell."""
        if not (folder / "model_index.json").is_file():
            return USUAL
        index, vae = (read_json(folder / name) for name in ("model_index.json", "vae/config.json"))
        family = FAMILIES.get(str(index.get("_class_name")), WAN)
        time, space = family.shrinks(vae)
        return Given(space, bool(index.get("expand_timesteps")), family.takes_pictures, time, family)

    def latents(self, settings: GenerationConfig) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        frames = (settings.num_frames - 1) // self.in_time + 1
        return frames, settings.height // self.in_space, settings.width // self.in_space

    def inputs(
        self, config: Any, settings: GenerationConfig, rows: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, Any]:
        """Of one pass on ``rows`` videos, made by ``make(*size, dtype=…)``."""
        how = {"timestep_per_token": self.timestep_per_token}
        return self.family.inputs(config, self.latents(settings), settings, rows, make, **how)


#: Of Wan's text-to-video models, but for Wan2.2-TI2V.
USUAL = Given()


@dataclass(frozen=True)
class Quantized:
    """How blocks are: ``names`` of their linears that are quantized, as inside a block."""

    names: Sequence[str]
    scheme: Scheme


def empty_vae(folder: Path, family: Family = WAN) -> Any:
    """On the meta device."""
    return vae_of(read_json(folder / "config.json"), family)


def vae_of(config: Mapping[str, Any], family: Family = WAN) -> Any:
    """By its config alone, which does not count where it is."""
    with torch.device("meta"):
        vae = family.vae.from_config({key: value for key, value in config.items() if not key.startswith("_")}).eval()
    family.prepare(vae)
    return vae


def empty_encoder(folder: Path, kind: Any) -> nn.Module:
    """Of text or of pictures, by its class."""
    with torch.device("meta"):
        found: nn.Module = kind(kind.config_class(**read_json(folder / "config.json"))).eval()
    return found


def empty_transformer(
    config: dict[str, Any], how: Quantized | None, blocks: int | Sequence[int], family: Family = WAN
) -> Any:
    """On meta, with so many blocks in each of its lists, which are ``how``."""
    lengths = [blocks] * len(family.block_lists) if isinstance(blocks, int) else blocks
    with torch.device("meta"):
        transformer = family.transformer.from_config(family.sized(config, lengths)).eval()
    for name, length in zip(family.block_lists, lengths, strict=True):
        setattr(transformer, name, getattr(transformer, name)[:length])
    if how is not None:
        scheme = replace(how.scheme, act_steps=1)  # blocks are run alone, where no transformer tells them the step
        names = linears_in(transformer, how.names)
        rotated = [] if scheme.rotation is None else [f"{name}.input_signs" for name in names]
        empty_like_quantized_(transformer, names, scheme, rotated)
    return transformer


def linears_in(transformer: Any, names: Sequence[str]) -> list[str]:
    """Of each block, those linears of these names that it has."""
    known = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    return [full for block in block_names(transformer) for name in names if (full := f"{block}.{name}") in known]


def block_inputs(
    transformer: WanTransformer3DModel, rows: int, tokens: int, text: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    """Hidden states, text (behind a picture's tokens, where the model has them), modulation and rotary embedding; the
    frames are as the tables of positions allow."""
    config = transformer.config
    text += PICTURE_TOKENS if config.added_kv_proj_dim is not None else 0
    width, longest = config.num_attention_heads * config.attention_head_dim, config.rope_max_seq_len
    hidden, words = (torch.full((rows, n, width), 0.5, dtype=dtype, device=device) for n in (tokens, text))
    frames = next(count for count in range(1, tokens + 1) if tokens % count == 0 and tokens // count <= longest)
    rotary = transformer.rope(torch.zeros(1, 1, frames, 2, 2 * tokens // frames))
    return hidden, words, torch.zeros(rows, 6, width, device=device), tuple(part.to(device) for part in rotary)


def parameters_of(model: nn.Module) -> int:
    """How many numbers they are."""
    return sum(parameter.numel() for parameter in model.parameters())


def sizes_of_layers(model: nn.Module) -> list[int]:
    """How many numbers each module has of its own; what two share counts once."""
    seen: set[int] = set()
    found = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, own))
        found.append(sum(parameter.numel() for parameter in own))
    return found


def fill(model: nn.Module, make: Callable[..., torch.Tensor], narrow: bool = True) -> None:
    """``make(size, dtype=...)`` in the place of meta tensors; a transformer, if ``narrow``, in BF16 but for what it
    keeps in float32."""
    denoises = narrow and isinstance(model, tuple(family.transformer for family in FAMILIES.values()))
    for name, module in model.named_modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_meta:
                continue
            full = f"{name}.{own}"
            wide = not denoises or tensor.dtype != torch.float32 or kept_in_fp32(model, full) or full.endswith(FLOAT32)
            made = make(tensor.shape, dtype=tensor.dtype if wide else torch.bfloat16)
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(made, requires_grad=False)
            else:
                module._buffers[own] = made


def tokens_of(settings: GenerationConfig, transformer: Any, given: Given = USUAL) -> int:
    """Of one video."""
    patch = given.family.patch(transformer.config)
    return math.prod(size // each for size, each in zip(given.latents(settings), patch, strict=True))
