"""The authors' names of Wan's tensors, against diffusers' own converter."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from wanquant.wan.checkpoints.names import config_to_diffusers, is_original, to_diffusers, to_original

#: As Wan2.1-T2V-14B's repository has it.
THEIRS = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 5120,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
}


def original_names(transformer: WanTransformer3DModel) -> dict[str, str]:
    """By diffusers' names."""
    return {name: to_original(name) for name in transformer.state_dict()}


def test_names_are_those_diffusers_converts_to() -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            **{**config_to_diffusers(THEIRS), "num_layers": 11, "num_attention_heads": 1, "ffn_dim": 64}
        )
    names = original_names(transformer)
    assert names.keys() == transformer.state_dict().keys()
    assert len(set(names.values())) == len(names)
    for ours, theirs in names.items():
        assert to_diffusers(theirs) == ours
        (converted,) = convert_wan_transformer_to_diffusers({theirs: torch.empty(2)})
        assert converted == ours
    assert any(map(is_original, names.values()))
    assert not any(map(is_original, names))


def test_the_shape_is_the_14b_s() -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config_to_diffusers(THEIRS))
    assert sum(p.numel() for p in transformer.parameters()) == 14_288_491_584


@pytest.mark.parametrize("name", ["blocks.0.cross_attn.k_img.weight", "img_emb.proj.0.weight", "blocks.0.norm9.weight"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="none of text-to-video Wan's"):
        to_diffusers(name)
    with pytest.raises(ValueError, match="has no name among the authors'"):
        to_original(name)
    with pytest.raises(ValueError, match="only text-to-video"):
        config_to_diffusers({**THEIRS, "model_type": "i2v"})
    with pytest.raises(ValueError, match="no num_heads"):
        config_to_diffusers({key: value for key, value in THEIRS.items() if key != "num_heads"})
