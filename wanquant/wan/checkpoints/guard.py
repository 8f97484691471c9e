"""What diffusers' methods do to a quantized model: what would lose scales does it right, or refuses in one line.

``quantize_`` and loading put a model of diffusers into a class of the same name, ``Guard`` before its own, as
``fully_shard`` of torch does it. Whether anything is quantized is asked at every call, so that a model which is plain
again is as it was.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.quant.convert import folded_names
from wanquant.wan.checkpoints.checkpoint import describe, quantized_linears, refuse_unsaved
from wanquant.wan.checkpoints.quantizer import attach
from wanquant.wan.families import folds_of

FUSE_FIRST = "fuse before quantize_: load the original model, fuse, quantize"


def guard_(model: Any) -> None:
    """Puts the model into its guarded class, in place; one that is there stays as it is."""
    if not isinstance(model, Guard):
        kind: Any = type(model)
        model.__class__ = _guarded(kind)


@cache
def _guarded(kind: Any) -> Any:
    return type(kind)(kind.__name__, (Guard, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _empty(kind: Any) -> Any:
    """For ``pickle``, which finds the class that is guarded under the name of both."""
    guarded = _guarded(kind)
    return guarded.__new__(guarded)


class Guard:
    """Before a class of diffusers' ``ModelMixin``."""

    @property
    def is_quantized(self) -> bool:
        """By which diffusers, too, refuses a cast."""
        return bool(quantized_linears(self))  # type: ignore[arg-type]

    @is_quantized.setter
    def is_quantized(self, value: bool) -> None:
        pass  # diffusers says so while it loads

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _empty, (type(self).__mro__[2],), *made[2:]

    def _refuse(self, what: str, instead: str) -> None:
        if self.is_quantized:
            raise ValueError(f"{what} on a quantized {type(self).__name__}: {instead}")

    def _refuse_cast(self, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            self._refuse(
                f"a cast to {dtype}", "its tensors have the types they were quantized for, leave the dtype out"
            )

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_cast(torch._C._nn._parse_to(*args, **kwargs)[1])  # type: ignore[attr-defined]
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def half(self, *args: Any) -> Any:
        self._refuse_cast(torch.float16)
        return super().half(*args)  # type: ignore[misc]

    def bfloat16(self) -> Any:
        self._refuse_cast(torch.bfloat16)
        return super().bfloat16()  # type: ignore[misc]

    def float(self, *args: Any) -> Any:
        self._refuse_cast(torch.float32)
        return super().float(*args)  # type: ignore[misc]

    def double(self) -> Any:
        self._refuse_cast(torch.float64)
        return super().double()  # type: ignore[misc]

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        packed = "QuantConfig(packed=True) or load_pipeline(folder, packed=True) keeps weights as codes"
        self._refuse("enable_layerwise_casting", packed)
        super().enable_layerwise_casting(*args, **kwargs)  # type: ignore[misc]

    def fuse_qkv_projections(self) -> None:
        self._refuse("fuse_qkv_projections", FUSE_FIRST)
        super().fuse_qkv_projections()  # type: ignore[misc]

    def unfuse_qkv_projections(self) -> None:
        self._refuse("unfuse_qkv_projections", "unfuse before quantize_, which quantizes what is in use")
        super().unfuse_qkv_projections()  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        folded = self._folded()
        super().add_adapter(*args, **kwargs)  # type: ignore[misc]
        self._refuse_beside(folded)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        folded = self._folded()
        made = super().load_lora_adapter(*args, **kwargs)  # type: ignore[misc]
        self._refuse_beside(folded)
        return made

    def _folded(self) -> set[str]:
        assert isinstance(self, nn.Module)
        return folded_names(self, folds_of(self)) if self.is_quantized else set()

    def _refuse_beside(self, folded: set[str]) -> None:
        """An adapter of channels that smoothing or rotation has changed since: they are not those it was made for."""
        assert isinstance(self, nn.Module)
        if wrong := [name for name in sorted(folded) if hasattr(self.get_submodule(name), "base_layer")]:
            plain: Any = self
            plain.unload_lora()
            how = "quantize the original model with it beside it (model.lora_fuse=false)"
            raise ValueError(f"a LoRA on {wrong[0]}, into which smoothing or rotation is folded: {how}")

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Of adapters beside plain linears alone: a weight that is rounded holds no such sum."""
        assert isinstance(self, nn.Module)
        if any(isinstance(getattr(child, "base_layer", None), QuantLinear) for child in self.modules()):
            self._refuse("fuse_lora", f"leave the LoRA unfused, or {FUSE_FIRST}")
        super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def _attached(self) -> None:
        """Has diffusers know how it is quantized, where it was not loaded so."""
        layers = quantized_linears(self)  # type: ignore[arg-type]
        if layers and getattr(self, "hf_quantizer", None) is None:
            described = describe(self, next(iter(layers.values())).scheme, list(layers))
            self.register_to_config(quantization_config=described)  # type: ignore[attr-defined]
            attach(self, described)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As codes with their scales, which ``from_pretrained`` reads after ``import wanquant`` and refuses without."""
        refuse_unsaved(self)  # type: ignore[arg-type]
        self._attached()
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def dequantize(self) -> Any:
        self._attached()
        return super().dequantize()  # type: ignore[misc]
