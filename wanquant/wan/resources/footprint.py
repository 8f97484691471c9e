"""What running a model takes of memory besides its weights, by running it without numbers.

torch's fake tensors have shapes, types and storages, and no memory. The real modules run on them op by op, and what is
alive at once is counted. Two blocks stand for all, since each frees what it took. What a kernel takes inside of an op
is not seen: other layouts of a convolution's input, a workspace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from wanquant.kernels import eager
from wanquant.quant.convert import empty_like_quantized_
from wanquant.quant.scheme import Scheme
from wanquant.wan.checkpoints.checkpoint import FLOAT32, kept_in_fp32, read_json
from wanquant.wan.config import GenerationConfig
from wanquant.wan.products import quick_products

#: Latents are so many times smaller in time, and in height and width.
IN_TIME, IN_SPACE = 4, 8

P = ParamSpec("P")
R = TypeVar("R")
Make = Callable[[torch.Size, torch.dtype], torch.Tensor]


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages made while entered that are still alive, and the ``most`` there were. Our own
    kernels need nothing more, unless they are ``eager``, plain torch."""

    def __init__(self, known: Sequence[torch.Tensor], eagerly: bool = False) -> None:
        super().__init__()
        self.most: int = 0
        self._eagerly = eagerly
        self._now = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._eagerly and op.namespace == "wanquant":
            with self:
                return getattr(eager, op.name().split("::")[1].split(".")[0])(*args, **(kwargs or {}))
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.most = max(self.most, self._now)
                    weakref.finalize(storage, self._released, storage._cdata)
        return output

    def _released(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


def once(function: Callable[P, R]) -> Callable[P, R]:
    """Kept for the process: the jobs of a sweep are planned one by one, and most of what they are is the same."""
    known: dict[str, R] = {}

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        key = repr((given, named))
        if key not in known:
            known[key] = function(*given, **named)
        return known[key]

    return call


@dataclass(frozen=True)
class Quantized:
    """How a block is: ``names`` of its linears that are quantized, as inside the block."""

    names: Sequence[str]
    scheme: Scheme


@once
def denoising_bytes(
    config: dict[str, Any], how: Quantized | None, settings: GenerationConfig, rows: int, device: torch.device
) -> int:
    """Of one forward pass of a transformer of this config, on ``rows`` videos."""
    if how is not None and how.scheme.product == "native":
        how = replace(how, scheme=replace(how.scheme, product="fast"))  # which runs anywhere, and needs no less
    transformer = empty_transformer(config, how, blocks=2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), quick_products(device):
        fill(transformer, _fake)
        latents = torch.empty(rows, config["in_channels"], *latent_size(settings), dtype=torch.bfloat16)
        text = torch.empty(rows, settings.max_text_length, config["text_dim"], dtype=torch.bfloat16)
        timestep = torch.empty(rows)
        alive = _alive(transformer, eagerly=device.type not in ("cpu", "cuda"))
        with alive:
            transformer(latents, timestep, text, return_dict=False)
    return alive.most


@once
def decoding_bytes(folder: Path, settings: GenerationConfig) -> int:
    """Of decoding one video with the VAE of this folder."""
    vae = empty_vae(folder)
    with FakeTensorMode(), torch.no_grad():
        fill(vae, _fake)
        latents = torch.empty(1, vae.config.z_dim, *latent_size(settings))
        alive = _alive(vae)
        with alive:
            vae.decode(latents, return_dict=False)
    return alive.most


def empty_vae(folder: Path) -> AutoencoderKLWan:
    """On the meta device."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(read_json(folder / "config.json")).eval()


def empty_text_encoder(folder: Path) -> UMT5EncoderModel:
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**read_json(folder / "config.json"))).eval()


def latent_size(settings: GenerationConfig) -> tuple[int, int, int]:
    return (settings.num_frames - 1) // IN_TIME + 1, settings.height // IN_SPACE, settings.width // IN_SPACE


def empty_transformer(config: dict[str, Any], how: Quantized | None, blocks: int) -> WanTransformer3DModel:
    """On meta; its blocks are ``how``."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config({**config, "num_layers": blocks}).eval()
    if how is not None:
        names = [f"blocks.{index}.{name}" for index in range(blocks) for name in how.names]
        empty_like_quantized_(transformer, names, how.scheme)
    return transformer


def _fake(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def fill(model: nn.Module, make: Make, narrow: bool = True) -> None:
    """In the place of meta tensors; a transformer, if ``narrow``, in BF16 but for what it keeps in float32."""
    wan = narrow and isinstance(model, WanTransformer3DModel)
    for name, module in model.named_modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_meta:
                continue
            full = f"{name}.{own}"
            wide = not wan or tensor.dtype != torch.float32 or kept_in_fp32(model, full) or full.endswith(FLOAT32)
            made = make(tensor.shape, tensor.dtype if wide else torch.bfloat16)
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(made, requires_grad=False)
            else:
                module._buffers[own] = made


def _alive(model: nn.Module, eagerly: bool = False) -> Alive:
    return Alive([*model.parameters(), *model.buffers()], eagerly)
