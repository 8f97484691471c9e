"""LTX-Video: latents packed into tokens, 32 times smaller than the video in height and width and 8 times in time, and
one pass a denoising step on twice the rows, those without the prompt first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5EncoderModel

from wanquant.wan.config import GenerationConfig
from wanquant.wan.families.euler import EulerFamily
from wanquant.wan.families.family import Make, Text


@dataclass(frozen=True)
class LTXFamily(EulerFamily):
    def shrinks(self, vae: Any) -> tuple[int, int]:
        scaled = 2 ** sum(vae["spatio_temporal_scaling"])
        time, space = vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
        return time or vae["patch_size_t"] * scaled, space or vae["patch_size"] * scaled

    def inputs(
        self, config: Any, size: tuple[int, int, int], settings: GenerationConfig, rows: int, make: Make, **how: Any
    ) -> dict[str, Any]:
        rows *= settings.together
        time, side, _ = self.patch(config)
        tokens = math.prod(size) // (time * side**2)
        return {
            "hidden_states": make(rows, tokens, config["in_channels"], dtype=torch.bfloat16),
            "timestep": make(rows, dtype=torch.float32),
            "encoder_hidden_states": make(
                rows, settings.max_text_length, config["caption_channels"], dtype=torch.bfloat16
            ),
            "encoder_attention_mask": make(rows, settings.max_text_length, dtype=torch.bool),
            **dict(zip(("num_frames", "height", "width"), size, strict=True)),
        }

    def embed(self, pipe: Any, prompt: str, settings: GenerationConfig) -> Text:
        found = pipe.encode_prompt(prompt, None, False, max_sequence_length=settings.max_text_length)
        return {"prompt_embeds": found[0][0], "prompt_attention_mask": found[1][0]}

    def asked(self, pipe: Any, settings: GenerationConfig) -> dict[str, Any]:
        return {"guidance_scale": settings.guidance_scale, "frame_rate": settings.fps}

    def denoise(
        self, pipe: Any, text: Text, negative: Text, noise: torch.Tensor, settings: GenerationConfig, **given: Any
    ) -> torch.Tensor:
        patch = (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        packed = pipe._pack_latents(noise, *patch)
        found = super().denoise(pipe, text, negative, packed, settings, **given)
        unpacked: torch.Tensor = pipe._unpack_latents(found, *noise.shape[2:], *patch)
        return unpacked

    def pixels(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        vae = pipe.vae
        latents = pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        latents = latents.to(torch.bfloat16).to(vae.dtype)  # the text's type, as the pipeline has it
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        pixels: torch.Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return pixels


LTX = LTXFamily(
    LTXPipeline,
    LTXVideoTransformer3DModel,
    AutoencoderKLLTXVideo,
    {"text_encoder": T5EncoderModel},
    folds={"attn1.to_out.0": "attn1.to_v", "attn2.to_out.0": "attn2.to_v"},
    block_lists={"transformer_blocks": "num_layers"},
    guidance="batch",
)
