"""Pipelines of other kinds than tiny-wan's, as small as they get, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from wanquant import load_pipeline
from wanquant.wan.tiny import draw, parse_caption

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "freq_dim": 64}
#: 4 channels of a mask and 16 of the first frame's latents come beside the noise.
WITH_PICTURE = {"in_channels": 36, "out_channels": 16}


def transformer(text_dim: int, blocks: int = 3, **sizes: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(num_layers=blocks, text_dim=text_dim, **SMALL, **sizes).bfloat16()


def image_to_video(folder: Path, encoder: bool = True) -> Path:
    """As Wan2.1 has it, with an encoder of pictures; without, as each half of Wan2.2 is. Its VAE is tiny-wan's."""
    parts = load_pipeline("tiny", "cpu").components
    sizes: dict[str, Any] = dict(WITH_PICTURE)
    if encoder:
        sizes |= {"image_dim": 32, "added_kv_proj_dim": 48}
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        clip = CLIPVisionConfig(image_size=28, patch_size=14, **small)
        size = {"height": 28, "width": 28}
        parts["image_encoder"] = CLIPVisionModel(clip)
        parts["image_processor"] = CLIPImageProcessor(size=size, crop_size=size)
    parts["transformer"] = transformer(parts["text_encoder"].config.d_model, **sizes)
    WanImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


def text_and_image_to_video(folder: Path, picture: bool = False) -> Path:
    """As Wan2.2-TI2V: 48 latent channels, 16 times smaller than the video, and a timestep for each token."""
    parts = load_pipeline("tiny", "cpu").components
    torch.manual_seed(0)
    parts["vae"] = AutoencoderKLWan(
        base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 48,
        latents_std=[0.5] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    width = parts["text_encoder"].config.d_model
    parts["transformer"] = transformer(width, in_channels=48, out_channels=48)
    kind = WanImageToVideoPipeline if picture else WanPipeline
    kind(**parts, expand_timesteps=True).save_pretrained(folder)
    return folder


def vace(folder: Path) -> Path:
    """With tiny-wan's text encoder: four blocks, and two that read the control, beside 0 and 2."""
    parts = load_pipeline("tiny", "cpu").components
    del parts["transformer_2"]
    torch.manual_seed(0)
    parts["vae"] = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)  # of three halvings, as Wan's
    kept = WanVACETransformer3DModel._keep_in_fp32_modules
    sizes: dict[str, Any] = {**SMALL, "text_dim": parts["text_encoder"].config.d_model, "vace_in_channels": 96}
    model = WanVACETransformer3DModel(num_layers=4, vace_layers=[0, 2], **sizes)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if set(kept) & set(name.split(".")) else parameter.data.bfloat16()
    WanVACEPipeline(**{**parts, "transformer": model}).save_pretrained(folder)
    return folder


def ltx(folder: Path) -> Path:
    """LTX-Video, with a T5 encoder and tiny-wan's tokenizer."""
    tokenizer = load_pipeline("tiny", "cpu").tokenizer
    torch.manual_seed(0)
    text = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    vae = AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    sizes: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 24}
    transformer = LTXVideoTransformer3DModel(**sizes, cross_attention_dim=48, num_layers=4, caption_channels=32)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    LTXPipeline(scheduler, vae, T5EncoderModel(text), tokenizer, transformer.bfloat16()).save_pretrained(folder)
    return folder


def hunyuan(folder: Path) -> Path:
    """HunyuanVideo, its two text encoders with tiny-wan's tokenizer."""
    tokenizer = load_pipeline("tiny", "cpu").tokenizer
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    small |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 8, 8),
    )
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    encoders = LlamaModel(LlamaConfig(**small, **ends)), CLIPTextModel(CLIPTextConfig(**small, **ends))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = (encoders[0], tokenizer, transformer.bfloat16(), vae, scheduler, encoders[1], tokenizer)
    HunyuanVideoPipeline(*parts).save_pretrained(folder)
    return folder


def first_frame(folder: Path, caption: str) -> Path:
    """A picture for a caption of tiny-wan's, larger than its videos and not square."""
    frames = draw(parse_caption(caption), np.random.default_rng(0), 1)
    path = folder / f"{caption}.png"
    Image.fromarray(frames[0]).resize((160, 96)).save(path)
    return path
