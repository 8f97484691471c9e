"""LoRAs of a pipeline: fused into the weights before anything is calibrated, W + scale · alpha / r · B A, summed in
float32; or beside them, W x + B (A x), where the weights alone are quantized and what is added is a product in BF16.
Files are read as ``wanquant.wan.checkpoints.lora_file`` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.convert import folded_names
from wanquant.runs.files import sum_of_file
from wanquant.wan.checkpoints.lora_file import FUSED_ONLY, Lora, read_lora
from wanquant.wan.config import ModelConfig
from wanquant.wan.experts import parts_of, transformers_in, whole_of
from wanquant.wan.families import family_of, folds_of
from wanquant.wan.resources.placement import placement_of

#: What a file is for, of a pipeline of two transformers: the first denoises while the noise is high.
EXPERTS = ("high", "low")
#: By the parts of a transformer, what each gets, by its place among the files.
Loras = list[tuple[nn.Module, dict[int, Lora]]]


def parse_lora(given: str) -> tuple[str, Path, float]:
    """``path``, ``path:scale``, or either behind ``high=`` or ``low=``: which of two transformers (empty: whichever
    there are), the file, the scale. A file whose own name begins so is given as ``./high=...``, one that ends in a
    colon and a number with a scale behind it."""
    which, _, rest = given.partition("=")
    which, rest = (which, rest) if which in EXPERTS else ("", given)
    path, _, scale = rest.rpartition(":")
    try:
        file, by = (Path(path).expanduser(), float(scale)) if path else (Path(rest).expanduser(), 1.0)
    except ValueError:
        file, by = Path(rest).expanduser(), 1.0
    if not math.isfinite(by):
        raise ValueError(f"model.lora={given}: its scale must be finite")
    if not file.is_file():
        raise ValueError(f"model.lora={given}: no file {file}, give [high=|low=]path[:scale] of a .safetensors file")
    return which, file, by


def describe_loras(config: ModelConfig) -> list[dict[str, Any]]:
    """Of each its file's name and sum, the scale, the transformer it is for (empty: all), and whether it is fused."""
    found, fused = map(parse_lora, config.lora), config.lora_fuse
    return [
        {"file": path.name, "scale": scale, "transformer": which, "fused": fused, "sha256": sum_of_file(path)}
        for which, path, scale in found
    ]


def read_loras(given: Sequence[str], transformer: nn.Module) -> Loras:
    """Of a transformer, or of each of two as one (``wanquant.wan.experts``), what it gets of the files."""
    found: Loras = [(part, {}) for part in parts_of(transformer)]
    for place, each in enumerate(given):
        which, path, scale = parse_lora(each)
        if which and len(found) == 1:
            raise ValueError(f"model.lora={each}: {which}= is for pipelines of two transformers, and this has one")
        for name, (part, loras) in zip(EXPERTS, found, strict=False):
            if which in ("", name):
                loras[place] = read_lora(path, scale, part)
    return found


def check_loras(config: ModelConfig, transformer: nn.Module, quantized: bool = False) -> int:
    """``ValueError`` for files that do not fit a model, on meta or not, which may be ``quantized`` in its files. Bytes
    that stay beside its weights."""
    if config.lora and not family_of(type(parts_of(transformer)[0]).__name__).is_wan:
        raise ValueError("model.lora is for Wan's transformers: fuse with diffusers and save the result")
    if config.lora_fuse:
        if quantized and config.lora:
            beside = "model.lora_fuse=false has it beside the weights"
            raise ValueError(f"model.lora: nothing can be fused into a quantized model, {beside}")
        read_loras(config.lora, transformer)
        return 0
    if config.lora and (config.outliers.blocks or config.outliers.count):
        raise ValueError("model.outliers are planted in weights alone: leave them out, or model.lora_fuse=true")
    found = read_beside(config.lora, transformer)
    return 2 * sum(lora.elements for _, loras in found for lora in loras.values())


def read_beside(given: Sequence[str], transformer: nn.Module) -> Loras:
    """As ``read_loras``. ``ValueError`` also for what is no product, and beside a linear whose channels smoothing
    or rotation has changed: they are not those that A or B was made for."""
    found = read_loras(given, transformer)
    for part, loras in found:
        folded = folded_names(part, folds_of(part))
        for lora in loras.values():
            for parts in lora.keys.values():
                if unlike := [parts[kind] for kind in FUSED_ONLY if kind in parts]:
                    raise ValueError(f"{lora.path}: {unlike[0]} can only be fused, before the model is quantized")
            if wrong := folded.intersection(lora.keys):
                how = "quantize the original model with this file beside it (model.lora_fuse=false)"
                raise ValueError(
                    f"{lora.path}: smoothing or rotation is folded into {min(wrong)} of this quantized model: {how}"
                )
    return found


def add_loras_(transformer: nn.Module, config: ModelConfig) -> None:
    """``model.lora`` as ``model.lora_fuse`` has it, to a model that was loaded."""
    (fuse_loras_ if config.lora_fuse else keep_loras_beside_)(transformer, config.lora)


@torch.no_grad()
def fuse_loras_(transformer: nn.Module, given: Sequence[str]) -> None:
    """Adds files (``parse_lora``) to the weights of a model that is not quantized, or of two as one
    (``wanquant.wan.experts.whole_of``); each weight is rounded once, whatever their number."""
    if given and any(isinstance(child, QuantLinear) for child in transformer.modules()):
        raise ValueError("model.lora: the model is quantized, to which no LoRA can be added; take the original model")
    for part, loras in read_loras(given, transformer):
        with ExitStack() as opened:
            files = [opened.enter_context(safe_open(lora.path, "pt")) for lora in loras.values()]
            for name, parameter in part.named_parameters() if loras else ():
                each = (lora.added(file, name, parameter) for lora, file in zip(loras.values(), files, strict=True))
                if deltas := [delta for delta in each if delta is not None]:
                    parameter.copy_(parameter.float() + torch.stack(deltas).sum(0))


@torch.no_grad()
def keep_loras_beside_(transformer: nn.Module, given: Sequence[str]) -> None:
    """As ``load_loras``, bit for bit, and without peft: by forward hooks, which ``quantize_`` leaves in place. Names of
    modules stay what they are, and what is saved is the model alone."""
    for part, loras in read_beside(given, transformer):
        device = placement_of(part).device
        for lora in loras.values():
            for module, down, up in lora.branches(part):
                part.get_submodule(module).register_forward_hook(_branch(down.to(device), up.to(device)))


def _branch(down: torch.Tensor, up: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A forward hook; a function, so that copies of a module share the tensors."""

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].to(down.dtype)
        if isinstance(module, nn.Conv3d):
            x = F.conv3d(F.conv3d(x, down, None, module.stride, module.padding, module.dilation), up)
        else:
            x = F.linear(F.linear(x, down), up)
        return (output + x).to(output.dtype)

    return add


def load_loras(pipe: Any, given: Sequence[str]) -> None:
    """Puts files (``parse_lora``) beside the linears of the pipeline's transformers, quantized or not, as diffusers'
    ``load_lora_weights`` does, which they are handed to as ``lora_0``, ``lora_1`` and so on. ``ValueError`` as in
    ``read_beside``."""
    loaded = read_beside(given, whole_of(pipe))
    for name, (part, loras) in zip(transformers_in(pipe), loaded, strict=True):
        for place, lora in loras.items():
            state: dict[str, torch.Tensor] = {}
            for module, down, up in lora.branches(part):
                state |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
            second = name == "transformer_2"
            pipe.load_lora_weights(state, adapter_name=f"lora_{place}", load_into_transformer_2=second)
    if given:
        pipe.set_adapters([f"lora_{place}" for place in range(len(given))])
