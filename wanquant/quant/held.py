"""What a quantized linear holds: codes or values on the grid, scales, and what else is beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from torch import nn

from wanquant.kernels import make_tables
from wanquant.quant.rotate import rotate, rotation_of
from wanquant.quant.scheme import Scheme
from wanquant.quant.steps import Timestep

#: Buffers that a layer may have beside those of its scheme.
OPTIONAL = ("input_factor", "input_signs")


class HeldLinear(nn.Linear):
    """Tensors of an ``nn.Linear`` after quantization; ``wanquant.quant.linear`` multiplies with them.

    weight        BF16 [out, in]: values on the format's grid; or uint8 [out, bytes of a row]: their codes (packed)
    weight_scale  float32 [out], or [] per tensor
    input_scale   float32 [], with static activations only; [n] with a scale for each bin of denoising steps
    input_bounds  float32 [n - 1]: of these bins the timesteps below which the next one begins
    input_factor  float32 [in], powers of two by which channels are multiplied before rounding; where smoothing is
    input_signs   float32 [size], of the rotation of inputs (``wanquant.quant.rotate``); where that is, and not folded
    low_rank_down BF16 [rank, in], and low_rank_up [out, rank]: the branch beside the weight, of inputs as they come
    bias          BF16
    overflowed    int64 []: elements of all inputs so far that fell beyond the format's range
    overflowed_weight  int64 []: elements of the weight that did, as it was quantized; 0 of one from a checkpoint
    lost          int64 [2]: of all inputs so far, values that a product of codes does not hold, and all of them
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    input_factor: torch.Tensor | None
    input_signs: torch.Tensor | None
    input_bounds: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    overflowed: torch.Tensor
    overflowed_weight: torch.Tensor
    lost: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, own: Collection[str] = ()
    ) -> None:
        """An empty layer of the right shapes, on meta; ``from_linear`` or a checkpoint fills it. ``own``: which of
        ``OPTIONAL`` it has."""
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=torch.bfloat16)
        self.scheme = scheme
        stored = (scheme.format.row_bytes(in_features), torch.uint8) if scheme.coded else (in_features, torch.bfloat16)
        self.weight = nn.Parameter(torch.empty(out_features, stored[0], dtype=stored[1], device="meta"), False)
        shape = scheme.weight_granularity.scale_shape(out_features)
        self.register_buffer("weight_scale", torch.empty(shape, device="meta"))
        several = scheme.act_steps > 1
        shape = (scheme.act_steps,) if several else ()
        self.register_buffer("input_scale", torch.empty(shape, device="meta") if scheme.act_static else None)
        bounds = torch.empty(scheme.act_steps - 1, device="meta") if several else None
        self.register_buffer("input_bounds", bounds)
        sizes = {"input_factor": in_features, "input_signs": scheme.rotation or 0}
        for name in OPTIONAL:
            self.register_buffer(name, torch.empty(sizes[name], device="meta") if name in own else None)
        rank = min(scheme.low_rank, in_features, out_features)
        down, up = (rank, in_features), (out_features, rank)
        for name, shape in (("low_rank_down", down), ("low_rank_up", up)):
            empty = torch.empty(shape, dtype=torch.bfloat16, device="meta") if scheme.low_rank else None
            self.register_buffer(name, empty)
        #: Of the pass that the transformer is in (``wanquant.quant.steps``).
        self.timestep: Timestep | None = None
        #: The rotation, float32 [size, size], of ``input_signs``.
        self._rotation: torch.Tensor | None = None
        # No buffers: offloading puts those back as they were before the pass.
        self.overflowed, self.overflowed_weight = (torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(2))
        self.lost = torch.zeros(2, dtype=torch.int64, device="cpu")
        #: What tells the weight it was made of, and its codes as a product takes them.
        self._coded: tuple[Any, torch.Tensor] | None = None
        #: Not where weights are brought to a device for each pass, on which the codes of all would stay.
        self.keeps_codes = True

    @property
    def is_packed(self) -> bool:
        return self.weight.dtype == torch.uint8

    def codes(self) -> torch.Tensor:
        """The weights as uint8 codes [out, bytes of a row], packed or not; exact."""
        return self.weight.data if self.is_packed else self.scheme.format.pack(self.weight.data)

    def pack_(self) -> Self:
        """Keeps the weights as codes, half the memory; they are decoded in every forward."""
        self.weight = nn.Parameter(self.codes(), requires_grad=False)
        return self

    def unpack_(self) -> Self:
        """Keeps the weights as BF16 values. Nothing is lost either way."""
        if self.is_packed:
            self.weight = nn.Parameter(self.scheme.format.decode(self.weight.data), requires_grad=False)
        return self

    def dequantized(self) -> nn.Linear:
        """A plain linear of what the codes mean, in BF16: rounded once more unless the scales are powers of two."""
        values = self.scheme.format.decode(self.codes(), torch.float32)
        values = values * (self.weight_scale[:, None] if self.weight_scale.ndim else self.weight_scale)
        if self.input_signs is not None:
            values = rotate(values, rotation_of(self.input_signs).T)
        if self.input_factor is not None:
            values = values * self.input_factor  # by whose inverse the weights were multiplied
        if self.low_rank_up is not None and self.low_rank_down is not None:
            values = values + self.low_rank_up.float() @ self.low_rank_down.float()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, values.device, torch.bfloat16)
        linear.weight = nn.Parameter(values.to(torch.bfloat16), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Packed weights into unpacked ones and the other way; ``ValueError`` for those of a plain linear."""
        name, format_, self._coded = f"{prefix}weight", self.scheme.format, None
        if name in state_dict and f"{name}_scale" not in state_dict:
            raise ValueError(f"{name} comes without its scale: load it into the plain model, then quantize_")
        weight = state_dict.get(name, self.weight)
        if (weight.dtype == torch.uint8) != self.is_packed:
            made = format_.pack(weight) if self.is_packed else format_.decode(weight)
            state_dict = {**state_dict, name: made}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        """Moves like any module, but a change of type leaves all tensors what they are."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        before, self._coded = {name: parameter.data for name, parameter in self.named_parameters()}, None
        super()._apply(fn, recurse)
        for name, parameter in list(self.named_parameters()):
            if parameter.dtype != before[name].dtype:
                setattr(self, name, nn.Parameter(before[name].to(parameter.device), requires_grad=False))
        if not self.weight.is_meta:
            for name in ("overflowed", "overflowed_weight", "lost"):
                setattr(self, name, getattr(self, name).to(self.weight.device))
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        make_tables(self.weight.device, self.scheme.overflow)
        self._prepare_rotation()
        return self

    def _prepare_rotation(self) -> None:
        made = self.input_signs is not None and not self.input_signs.is_meta
        self._rotation = rotation_of(self.input_signs) if made and self.input_signs is not None else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.scheme.format.name}, packed={self.is_packed}"
