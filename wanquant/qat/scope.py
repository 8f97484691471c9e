"""Which parameters are trained.

``all``      every parameter of the transformer
``blocks``   those of chosen blocks
``norms``    the norms, biases and modulations of all blocks; matrices stay
``scales``   the scales of the quantized linears alone (LSQ); in static inputs those too
``lora``     matrices of low rank beside the quantized linears' weights, through peft: what is rounded is their sum,
             which is what is saved
``blockwise`` every block, but one after the other (``wanquant.qat.blockwise``)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from wanquant.quant.trainable import TrainableQuantLinear, trainable_linears


def trains_weights(scope: str) -> bool:
    """Whether the matrices themselves are trained, so that they have to be in float32."""
    return scope in ("all", "blocks", "blockwise")


def choose_(
    transformer: nn.Module, scope: str, blocks: Collection[int], rank: int, alpha: int, seed: int = 0
) -> list[nn.Parameter]:
    """Turns gradients on for what the scope trains, in float32, and off for the rest. Returns it.

    ``blocks`` are those that may be trained. ``seed`` is for what begins at random, in ``lora``. ``ValueError`` if
    nothing is left to train.
    """
    if scope == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            add_lora_(transformer, blocks, rank, alpha)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(_is_trained(name, parameter, scope, blocks))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"qat.scope={scope} leaves nothing to train: protect fewer blocks, or choose another scope")
    return trained


def _is_trained(name: str, parameter: nn.Parameter, scope: str, blocks: Collection[int]) -> bool:
    parts = name.split(".")
    inside = parts[0] == "blocks" and int(parts[1]) in blocks
    gain = parts[-1] in ("weight_gain", "input_gain")
    if scope == "lora":
        return "lora_" in name
    if gain or scope == "scales":
        return gain and inside and scope == "scales"
    if scope == "norms":
        return inside and not is_matrix(name, parameter)
    return scope == "all" or inside


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A modulation has dimensions too, but is none."""
    return name.endswith("weight") and parameter.ndim > 1


def add_lora_(transformer: nn.Module, blocks: Collection[int], rank: int, alpha: int) -> None:
    """An adapter of this rank beside every quantized linear of these blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("qat.scope=lora needs peft: install the extra lora") from None
    targets = [name for name in trainable_linears(transformer) if int(name.split(".")[1]) in blocks]
    if not targets:
        raise ValueError("qat.scope=lora: no quantized linear is in the chosen blocks")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    config._register_custom_module({TrainableQuantLinear: _lora_class()})
    inject_adapter_in_model(config, transformer)


def _lora_class() -> type[nn.Module]:
    """Made when it is needed, because peft is an extra."""
    from peft.tuners.lora import LoraLayer

    class LoraQuantLinear(nn.Module, LoraLayer):
        """Rounds the sum of weight and adapter, so that what is trained is what is saved."""

        base_layer: Any
        lora_A: Any
        lora_B: Any
        scaling: Any
        update_layer: Any

        def __init__(self, base_layer: TrainableQuantLinear, adapter_name: str, r: int, **kwargs: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = self.adapter = adapter_name
            self.update_layer(adapter_name, r, **kwargs)

        def merged_weight(self) -> torch.Tensor:
            down, up = (part[self.adapter].weight for part in (self.lora_A, self.lora_B))
            merged: torch.Tensor = self.base_layer.weight.float() + up @ down * self.scaling[self.adapter]
            return merged

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, enabled=False):
                weight = self.merged_weight()
            y: torch.Tensor = self.base_layer.of(x, weight)
            return y

    return LoraQuantLinear


def merge_lora_(transformer: nn.Module) -> None:
    """Puts each adapter into its linear's weight, and the linear back where it was."""
    modules: list[tuple[str, Any]] = list(transformer.named_modules())
    for name, child in modules:
        if hasattr(child, "merged_weight"):
            child.base_layer.weight = nn.Parameter(child.merged_weight().detach(), requires_grad=False)
            transformer.set_submodule(name, child.base_layer)
