"""HunyuanVideo: blocks of two streams and then of one, two text encoders, and a guidance scale that is an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from transformers import CLIPTextModel, LlamaModel

from wanquant.wan.config import GenerationConfig
from wanquant.wan.families.euler import EulerFamily
from wanquant.wan.families.family import COMPONENTS, Make, Text


@dataclass(frozen=True)
class HunyuanFamily(EulerFamily):
    def shrinks(self, vae: Any) -> tuple[int, int]:
        return vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]

    def prepare(self, vae: Any) -> None:
        """In tiles, as no card decodes a video of the model's size at once."""
        vae.enable_tiling()

    def tile(self, vae: Any) -> tuple[float, float, float]:
        """Of two that follow each other in time, which are blended."""
        time, space = self.shrinks(vae.config)
        return (
            2 * vae.tile_sample_min_num_frames // time,
            vae.tile_sample_min_height // space,
            vae.tile_sample_min_width // space,
        )

    def inputs(
        self, config: Any, size: tuple[int, int, int], settings: GenerationConfig, rows: int, make: Make, **how: Any
    ) -> dict[str, Any]:
        kind = {"dtype": torch.bfloat16}
        return {
            "hidden_states": make(rows, config["in_channels"], *size, **kind),
            "timestep": make(rows, dtype=torch.float32),
            "encoder_hidden_states": make(rows, settings.max_text_length, config["text_embed_dim"], **kind),
            "encoder_attention_mask": make(rows, settings.max_text_length, **kind),
            "pooled_projections": make(rows, config["pooled_projection_dim"], **kind),
            "guidance": make(rows, **kind) if config["guidance_embeds"] else None,
        }

    def embed(self, pipe: Any, prompt: str, settings: GenerationConfig) -> Text:
        found = pipe.encode_prompt(prompt, max_sequence_length=settings.max_text_length)
        return dict(
            zip(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), (x[0] for x in found), strict=True)
        )

    def asked(self, pipe: Any, settings: GenerationConfig) -> dict[str, Any]:
        return {"guidance_scale": settings.guidance_scale}

    def pixels(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        vae = pipe.vae
        pixels: torch.Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pixels


#: What attention gives comes from values of both streams, so nothing is folded into one of them.
HUNYUAN = HunyuanFamily(
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    AutoencoderKLHunyuanVideo,
    {"text_encoder": LlamaModel, "text_encoder_2": CLIPTextModel},
    (*COMPONENTS, "text_encoder_2", "tokenizer_2"),
    folds={},
    block_lists={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    guidance="embedded",
)
