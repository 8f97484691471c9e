"""Networks of the true architecture with random weights, in the files and the form VBench and LPIPS load them from.
Scores made with them are meaningless; what is tested is everything else."""

from __future__ import annotations

import gzip
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanquant.evaluate.judges import vbench, weights

DINO = next(weight.url for weight in weights.WEIGHTS if weight.name == "checkpoints/dino_vitbase16_pretrain.pth")
#: As facebookresearch/dino's own: an entry point that torch.hub calls, which fetches its weights by torch.hub.
HUBCONF = f'''
import torch
from timm.models.vision_transformer import VisionTransformer

dependencies = ["torch", "timm"]


def dino_vitb16(pretrained=True, **kwargs):
    # Timm's own way to draw weights takes seconds, and here they are loaded.
    model = VisionTransformer(patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=0, weight_init="skip")
    if pretrained:
        state = torch.hub.load_state_dict_from_url(url="{DINO}", map_location="cpu")
        model.load_state_dict(state, strict=True)
    return model
'''


def package() -> Path:
    vbench.importable([])
    return Path(str(importlib.import_module("vbench").__file__)).parent


def place(name: str) -> Path:
    (weight,) = (each for each in weights.WEIGHTS if each.recorded_as == name)
    weight.path.parent.mkdir(parents=True, exist_ok=True)
    return weight.path


def amt() -> None:
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    network = build_from_cfg(OmegaConf.load(package() / "third_party/amt/cfgs/AMT-S.yaml").network)
    torch.save({"state_dict": network.state_dict()}, place("amt_model/amt-s.pth"))


def raft() -> None:
    """Saved from a DataParallel."""
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    network = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(state, place("raft_model/models/raft-things.pth"))


def dino() -> None:
    repository = place("dino_model/facebookresearch_dino_main")
    repository.mkdir(exist_ok=True)
    (repository / "hubconf.py").write_text(HUBCONF)
    scope: dict[str, Any] = {}
    exec(HUBCONF, scope)  # what the hub will build
    network = scope["dino_vitb16"](pretrained=False)
    torch.save(network.state_dict(), place("torch/checkpoints/dino_vitbase16_pretrain.pth"))
    place("dino_model/dino_vitbase16_pretrain.pth").symlink_to(place("torch/checkpoints/dino_vitbase16_pretrain.pth"))


def clip(name: str, width: int, layers: int, patch: int, text: int, embedded: int) -> None:
    """A TorchScript archive in half precision, as OpenAI's."""
    from clip.model import CLIP

    network = CLIP(embedded, 224, layers, width, patch, 77, 49408, text, text // 64, 12).eval()
    for key, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        buffer = torch.tensor(value)
        delattr(network, key) if hasattr(network, key) else None
        network.register_buffer(key, buffer)
    example = torch.randn(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.trace(network, example, check_trace=False).half().save(str(place(f"clip_model/{name}.pt")))


def aesthetic() -> None:
    clip("ViT-L-14", 1024, 24, 14, 768, 768)
    torch.save(nn.Linear(768, 1).state_dict(), place("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"))


def musiq() -> None:
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.save(MUSIQ(pretrained=False).state_dict(), place("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"))


def viclip() -> None:
    import clip as openai

    vocabulary = place("ViCLIP/bpe_simple_vocab_16e6.txt.gz")
    shutil.copyfile(Path(openai.__file__).parent / vocabulary.name, vocabulary)
    with gzip.open(vocabulary) as file:
        assert file.read(1)
    module = importlib.import_module("vbench.third_party.ViCLIP.viclip")
    tokenizer = importlib.import_module("vbench.third_party.ViCLIP.simple_tokenizer").SimpleTokenizer(str(vocabulary))
    network = module.ViCLIP(tokenizer=tokenizer, pretrain=None)
    for parameter in network.parameters():  # some are left as memory was
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    torch.save({"model": network.state_dict()}, place("ViCLIP/ViClip-InternVid-10M-FLT.pth"))


def umt() -> None:
    module = importlib.import_module("vbench.third_party.umt.models.modeling_finetune")
    network = module.vit_large_patch16_224(num_classes=400, all_frames=16, tubelet_size=1, use_mean_pooling=True)
    torch.save(network.state_dict(), place("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"))


def alexnet() -> None:
    from torchvision.models import alexnet as build

    torch.save(build().state_dict(), place("torch/checkpoints/alexnet-owt-7be5be79.pth"))


JUDGES: dict[str, Callable[[], None]] = {
    "motion_smoothness": amt,
    "dynamic_degree": raft,
    "subject_consistency": dino,
    "background_consistency": lambda: clip("ViT-B-32", 768, 12, 32, 512, 512),
    "imaging_quality": musiq,
    "aesthetic_quality": aesthetic,
    "overall_consistency": viclip,
    "human_action": umt,
}
#: Of more than 150 million parameters, or slow on a CPU.
LARGE = (
    "subject_consistency",
    "dynamic_degree",
    "aesthetic_quality",
    "background_consistency",
    "overall_consistency",
    "human_action",
)
