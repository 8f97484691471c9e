"""Small real Wan transformers, and what they are given."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel


def wan_transformer(blocks: int = 4, dtype: torch.dtype = torch.bfloat16) -> WanTransformer3DModel:
    """A real Wan transformer, 48 wide, with random weights; the model's float32 modules stay so in BF16."""
    model = WanTransformer3DModel(
        num_layers=blocks, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, text_dim=32, freq_dim=64
    ).eval()
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def wan_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32).to(dtype),
    }
