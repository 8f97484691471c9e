"""Models without weights, on the meta device, and what they are given: what memory and time are predicted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wanquant.quant.convert import empty_like_quantized_
from wanquant.quant.scheme import Scheme
from wanquant.wan.checkpoints.checkpoint import FLOAT32, kept_in_fp32, read_json
from wanquant.wan.config import GenerationConfig
from wanquant.wan.families import FAMILIES, WAN

#: Latents are so many times smaller in time, and, unless the VAE's config says otherwise, in height and width.
IN_TIME, IN_SPACE = 4, 8
#: Tokens of a picture beside the text's, as Wan2.1's encoder makes them.
PICTURE_TOKENS = 257


@dataclass(frozen=True)
class Given:
    """What a pipeline gives its transformer and the transformer's config does not tell: how many times smaller latents
    are ``in_space``, whether a timestep comes with each token (Wan2.2-TI2V), whether videos start from a picture."""

    in_space: int = IN_SPACE
    timestep_per_token: bool = False
    picture: bool = False

    @staticmethod
    def of(folder: Path) -> Given:
        """Of a pipeline's folder; a transformer's own does not tell."""
        if not (folder / "model_index.json").is_file():
            return USUAL
        index, vae = (read_json(folder / name) for name in ("model_index.json", "vae/config.json"))
        family = FAMILIES.get(str(index.get("_class_name")), WAN)
        in_space = vae.get("scale_factor_spatial", IN_SPACE)
        return Given(in_space, bool(index.get("expand_timesteps")), family.takes_pictures)

    def latents(self, settings: GenerationConfig) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        frames = (settings.num_frames - 1) // IN_TIME + 1
        return frames, settings.height // self.in_space, settings.width // self.in_space

    def inputs(
        self, config: Any, settings: GenerationConfig, rows: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Of one pass on ``rows`` videos, made by ``make(*size, dtype=…)``."""
        size, kind = self.latents(settings), {"dtype": torch.bfloat16}
        tokens = math.prod(length // patch for length, patch in zip(size, config["patch_size"], strict=True))
        found = {
            "hidden_states": make(rows, config["in_channels"], *size, **kind),
            "timestep": make(*((rows, tokens) if self.timestep_per_token else (rows,)), dtype=torch.float32),
            "encoder_hidden_states": make(rows, settings.max_text_length, config["text_dim"], **kind),
        }
        if config["image_dim"] is not None:
            found["encoder_hidden_states_image"] = make(rows, PICTURE_TOKENS, config["image_dim"], **kind)
        return found


#: Of Wan's text-to-video models, but for Wan2.2-TI2V.
USUAL = Given()


@dataclass(frozen=True)
class Quantized:
    """How a block is: ``names`` of its linears that are quantized, as inside the block."""

    names: Sequence[str]
    scheme: Scheme


def empty_vae(folder: Path) -> AutoencoderKLWan:
    """On the meta device."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(read_json(folder / "config.json")).eval()


def empty_text_encoder(folder: Path) -> UMT5EncoderModel:
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**read_json(folder / "config.json"))).eval()


def empty_image_encoder(folder: Path) -> CLIPVisionModel:
    with torch.device("meta"):
        return CLIPVisionModel(CLIPVisionConfig(**read_json(folder / "config.json"))).eval()


def empty_transformer(config: dict[str, Any], how: Quantized | None, blocks: int) -> WanTransformer3DModel:
    """On meta; its blocks are ``how``."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config({**config, "num_layers": blocks}).eval()
    if how is not None:
        names = [f"blocks.{index}.{name}" for index in range(blocks) for name in how.names]
        empty_like_quantized_(transformer, names, how.scheme)
    return transformer


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


def fill(model: nn.Module, make: Callable[..., torch.Tensor], narrow: bool = True) -> None:
    """``make(size, dtype=...)`` in the place of meta tensors; a transformer, if ``narrow``, in BF16 but for what it
    keeps in float32."""
    wan = narrow and isinstance(model, WanTransformer3DModel)
    for name, module in model.named_modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_meta:
                continue
            full = f"{name}.{own}"
            wide = not wan or tensor.dtype != torch.float32 or kept_in_fp32(model, full) or full.endswith(FLOAT32)
            made = make(tensor.shape, dtype=tensor.dtype if wide else torch.bfloat16)
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(made, requires_grad=False)
            else:
                module._buffers[own] = made


def tokens_of(settings: GenerationConfig, transformer: Any, given: Given = USUAL) -> int:
    """Of one video: patches of its latents, 1×2×2 of them each."""
    return math.prod(
        size // patch for size, patch in zip(given.latents(settings), transformer.config.patch_size, strict=True)
    )
