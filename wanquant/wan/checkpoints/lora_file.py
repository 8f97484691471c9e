"""LoRA files: of which module of a model each of their keys is, and what it adds there.

Three namings are read: diffusers' and peft's (``transformer.blocks.0.attn1.to_q.lora_A.weight``), that of Wan's authors
(``diffusion_model.blocks.0.self_attn.q.lora_A.weight``), kohya's (``lora_unet_blocks_0_self_attn_q.lora_down.weight``);
each with or without ``alpha``, and with whole differences: ``diff`` of a weight, ``diff_b`` of a bias. diffusers' own
converters leave out ``diff`` without a word and fail at kohya files of some linears only; here every key has a place,
or is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from wanquant.wan.checkpoints import names
from wanquant.wan.checkpoints.names import to_original

PREFIXES = ("base_model.model.", "transformer.", *names.PREFIXES, "lora_unet_")
#: By the ending of a key, what it is of the module named before it. ``shift`` is peft's bias of B, scaled as B is.
PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_A.default.weight", "lora_down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora_B.default.weight", "lora_up.weight"), "up"),
    "lora_B.bias": "shift",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
}
#: What of these is no product beside a weight's.
FUSED_ONLY = ("diff", "diff_b", "shift")


@dataclass(frozen=True)
class Lora:
    """What a file adds, times ``scale``: by module its keys of ``PARTS``. ``alpha`` is of those that have none of their
    own; None for the rank. ``elements`` are those of all its tensors."""

    path: Path
    scale: float
    keys: Mapping[str, Mapping[str, str]]
    alpha: float | None
    elements: int

    def factor(self, file: Any, module: str) -> float:
        """Scale · alpha / r of a module that has B and A."""
        parts = self.keys[module]
        rank = file.get_slice(parts["down"]).get_shape()[0]
        own = float(file.get_tensor(parts["alpha"])) if "alpha" in parts else self.alpha
        return self.scale * (1.0 if own is None else own / rank)

    def added(self, file: Any, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        """To a parameter of this name, float32 in its shape."""
        module, _, last = name.rpartition(".")
        module = module if module in self.keys and last in ("weight", "bias") else name
        parts, found = self.keys.get(module, {}), torch.zeros(parameter.shape, device=parameter.device)

        def read(part: str) -> torch.Tensor:
            tensor: torch.Tensor = file.get_tensor(parts[part])
            return tensor.to(parameter.device, torch.float32)

        scaled, whole = ("shift", "diff_b") if last == "bias" else ("up", "diff")
        if scaled not in parts and whole not in parts:
            return None
        if scaled in parts:
            product = read("up").flatten(1) @ read("down").flatten(1) if scaled == "up" else read("shift")
            found += self.factor(file, module) * product.view(parameter.shape)
        if whole in parts:
            found += self.scale * read(whole).view(parameter.shape)
        return found

    def branches(self, transformer: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """By module A, and B with the factor in it, in the type of its weight, and of a packed one in BF16."""
        with safe_open(self.path, "pt") as file:
            for module, parts in self.keys.items():
                weight: Any = transformer.get_submodule(module).weight
                dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
                up = file.get_tensor(parts["up"]).float() * self.factor(file, module)
                up = up.view(*up.shape[:2], *[1] * (weight.ndim - 2))
                yield module, file.get_tensor(parts["down"]).to(dtype), up.to(dtype)


def read_lora(path: Path, scale: float, model: nn.Module) -> Lora:
    """Of a model, on meta or not; no weights are read. ``ValueError`` names the first keys where none is of the model,
    the first that is not of it, one whose shape does not fit."""
    known, keys, strange = _spellings(model), dict[str, dict[str, str]](), list[str]()
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
            alpha = _alpha(file.metadata() or {}, path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file: {error}") from None
    for key in shapes:
        ending = next((ending for ending in PARTS if key.endswith(f".{ending}")), "")
        stem = key.removesuffix(f".{ending}")
        for prefix in PREFIXES:
            stem = stem.removeprefix(prefix)
        if ending and stem in known:
            keys.setdefault(known[stem], {})[PARTS[ending]] = key
        else:
            strange.append(key)
    if not keys:
        raise ValueError(f"{path}: none of its {len(shapes)} keys is of this model: {', '.join(list(shapes)[:3])}, ...")
    if strange:
        raise ValueError(f"{path}: {strange[0]} fits nothing of this model ({len(strange)} of {len(shapes)} keys)")
    parameters = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for module, parts in keys.items():
        _check(path, {part: (key, shapes[key]) for part, key in parts.items()}, module, parameters)
    return Lora(path, scale, keys, alpha, sum(map(math.prod, shapes.values())))


def _spellings(model: nn.Module) -> dict[str, str]:
    """By each name that a file may have for it, a module or a parameter that is no module's weight."""
    found: dict[str, str] = {}
    for name, _ in model.named_parameters():
        module, _, last = name.rpartition(".")
        name = module if last in ("weight", "bias") else name
        try:
            spelled = {name, to_original(name)}
        except ValueError:
            spelled = {name}
        found |= {form: name for each in spelled for form in (each, each.replace(".", "_"))}
    return found


def _check(
    path: Path, parts: Mapping[str, tuple[str, list[int]]], module: str, parameters: Mapping[str, list[int]]
) -> None:
    """Of a module its ``parts`` by their kind, each with key and shape."""
    weight = parameters.get(f"{module}.weight", parameters.get(module, []))
    bias = parameters.get(f"{module}.bias", [])
    first = next(iter(parts.values()))[0]
    if ("down" in parts) != ("up" in parts) or ({"alpha", "shift"} & set(parts) and "up" not in parts):
        raise ValueError(f"{path}: {first} has not both of lora_A and lora_B beside it")
    if "up" in parts:
        (key, down), (_, up) = parts["down"], parts["up"]
        if [up[0], *down[1:]] != weight or up[1] != down[0]:
            raise ValueError(f"{path}: {key} and its other half are {down} and {up}, for a weight of {weight}")
    for part, shape in (("diff", weight), ("diff_b", bias), ("shift", bias)):
        if part in parts and math.prod(parts[part][1]) != math.prod(shape or [0]):
            raise ValueError(f"{path}: {parts[part][0]} is {parts[part][1]}, to be added to {shape or 'nothing'}")


def _alpha(metadata: Mapping[str, str], path: Path) -> float | None:
    """Of all modules, as diffusers keeps it in the file and peft beside it."""
    text, beside = metadata.get("lora_adapter_metadata", "{}"), path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    settings = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    for name in ("alpha_pattern", "use_dora", "use_rslora"):
        if settings.get(name):
            raise ValueError(f"{path}: its {name} is not read here, fuse it with peft and give model.path the result")
    return settings.get("lora_alpha")
