"""diffusers' way to our checkpoints: what ``from_pretrained`` and ``save_pretrained`` ask of a quantization method.

    import wanquant
    pipe = WanPipeline.from_pretrained(folder)

The layers are the same as ``load_pipeline`` makes, and so is what is refused: nothing is cast, filled in or left out.
"""

from __future__ import annotations

import copy
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.convert import empty_like_quantized_, with_hooks_of
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.registered import METHOD, guard
from wanquant.wan.checkpoints.checkpoint import TYPES, check_part, config_of, quantized_linears
from wanquant.wan.checkpoints.sums import check_sums


class Method(StrEnum):
    WANQUANT = METHOD


class WanquantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint, as it is there."""

    def __init__(self, **described: Any) -> None:
        self.__dict__.update(described)
        self.quant_method = Method.WANQUANT

    def to_dict(self) -> dict[str, Any]:
        return {**copy.deepcopy(self.__dict__), "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """For diffusers, which prints what differs from the defaults: here there are none."""
        return self.to_dict()


def attach(transformer: Any, described: dict[str, Any]) -> None:
    """As ``from_pretrained`` leaves a quantized transformer, so that ``save_pretrained`` writes its codes again."""
    quantizer = WanquantQuantizer(WanquantConfig(**described), pre_quantized=True)
    transformer.is_quantized, transformer.quantization_method = True, quantizer.quantization_config.quant_method
    transformer.hf_quantizer = quantizer
    guard(transformer)


class WanquantQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    requires_calibration = True
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False

    def __init__(self, quantization_config: WanquantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError("this model is not quantized: quantize it with wanquant.quantize_, or with ptq.py")
        super().__init__(quantization_config, **kwargs)
        self.described = quantization_config.to_dict()
        self.scheme: Scheme = scheme_of(config_of(self.described))
        self.names = [str(name) for name in self.described["modules"]]
        self._ours = {f"{name}{end}" for name in self.names for end in TYPES}
        self._stored: set[str] = set()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """What is not quantized is stored in BF16, but for what the model keeps in float32."""
        if torch_dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype={torch_dtype}: a quantized transformer is in torch.bfloat16")
        return torch.bfloat16

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """By which diffusers reckons where a part of the model has room."""
        return torch.uint8 if self.scheme.coded else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The first that diffusers tells of the files; so their sums are checked here."""
        for folder in {Path(file).parent for file in checkpoint_files}:
            check_sums(folder)
        self._stored = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        empty_like_quantized_(model, self.names, self.scheme, self._stored)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """diffusers would fill them at random."""
        if missing_keys:
            raise ValueError(f"tensor {min(missing_keys)} is missing ({len(missing_keys)} in all)")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return param_name in self._ours

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """From the file's own tensor: ``param_value`` has been cast to the model's type already."""
        path, _, name = param_name.rpartition(".")
        layer, stored = model.get_submodule(path), state_dict[param_name]
        assert isinstance(layer, QuantLinear)
        check_part(layer, param_name, stored, "checkpoint")
        stored = stored.to(target_device)
        if name != "weight":
            setattr(layer, name, stored)
            return
        layer.weight = nn.Parameter(stored if self.scheme.coded else self.scheme.format.decode(stored), False)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        guard(model)
        model.requires_grad_(False)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """With weights as the codes they were loaded from."""
        found = dict(state_dict)
        for name in self.names:
            weight = found[f"{name}.weight"]
            if weight.dtype != torch.uint8:
                found[f"{name}.weight"] = self.scheme.format.pack(weight)
        return found, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Plain linears that hold what the codes mean, in BF16; nothing else is rounded any more."""
        dequantize_(model)
        settings: Any = model
        kept = {key: value for key, value in settings.config.items() if key != "quantization_config"}
        settings._internal_dict = FrozenDict(kept)  # or it would be saved as quantized
        return model


def dequantize_(transformer: nn.Module) -> None:
    """To plain linears of the codes' values in BF16, and attention as it was; nothing is rounded any more."""
    for name, layer in quantized_linears(transformer).items():
        transformer.set_submodule(name, with_hooks_of(layer, layer.dequantized()))
    for child in transformer.modules():
        if isinstance(child, WanAttention):
            child.set_processor(WanAttnProcessor())
