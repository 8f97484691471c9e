"""The quantized linear: W8A8 as hardware computes it.

    y = s_x · s_w · (Q(x / s_x) · Q(w / s_w)ᵀ) + b

Q rounds to an 8-bit format whose values are exact in BF16, so a BF16 product of them with float32
accumulation has exact products, provided the scales are applied after it. ``product=fast`` takes
that product in BF16, whose output is rounded once more; ``product=exact`` takes it in float32.

Differs from the usual fake quantization (dequantize both operands, then multiply) in that no scale
touches an operand: what is simulated is what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from wanquant.kernels import absmax_rows
from wanquant.quant.config import Scheme
from wanquant.quant.scale import PerTensor


def _column(scale: torch.Tensor) -> torch.Tensor:
    """[rows] to [rows, 1], to stand beside a matrix; [] stays."""
    return scale[:, None] if scale.ndim else scale


class QuantLinear(nn.Linear):
    """Takes the place of an ``nn.Linear``; a subclass of it, so that peft and diffusers recognise it.

    For inference: no gradient passes through the rounding.

    weight        [out, in]: BF16 values on the format's grid, or uint8 codes (packed)
    weight_scale  float32 [out], or [] per tensor
    input_scale   float32 [], with static activations only
    bias          BF16
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    #: Elements, of the weight and of all inputs so far, that fell beyond the format's range.
    overflowed: int

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme) -> None:
        """An empty layer of the right shapes, on meta; ``from_linear`` or a checkpoint fills it."""
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=torch.bfloat16)
        self.scheme = scheme
        self.overflowed = 0
        dtype = torch.uint8 if scheme.packed else torch.bfloat16
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device="meta"), False)
        scale_shape = () if isinstance(scheme.weight_granularity, PerTensor) else (out_features,)
        self.register_buffer("weight_scale", torch.empty(scale_shape, device="meta"))
        self.register_buffer("input_scale", torch.empty((), device="meta") if scheme.act_static else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, scheme: Scheme, input_absmax: float | None = None) -> QuantLinear:
        """Quantizes the weights, from BF16: a source in float32 is cast first, so both give the same.

        ``input_absmax`` is the calibrated largest magnitude of the input, needed by static schemes.
        """
        self = cls(linear.in_features, linear.out_features, linear.bias is not None, scheme)
        source = linear.weight.detach().to(torch.bfloat16)
        scale = scheme.weight_rule(scheme.weight_granularity.reduce(absmax_rows(source)))
        rounded = scheme.format.scaled_round(source, scale, scheme.overflow)
        self.weight = nn.Parameter(scheme.format.encode(rounded) if scheme.packed else rounded, requires_grad=False)
        self.weight_scale = scale
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(torch.bfloat16), requires_grad=False)
        self.overflowed = int((source.float().abs() >= scheme.format.overflow * _column(scale)).sum())
        if scheme.act_static:
            assert input_absmax is not None, "a static scheme needs a calibrated input"
            self.input_scale = scheme.act_rule(torch.tensor(input_absmax, device=source.device))
        self.train(linear.training)
        return self

    def codes(self) -> torch.Tensor:
        """The weights as uint8 codes [out, in], packed or not; exact."""
        return self.weight.data if self.weight.dtype == torch.uint8 else self.scheme.format.encode(self.weight.data)

    def quantize_input(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix [tokens, in] to BF16 values on the grid and their scale, [tokens] or []."""
        scheme = self.scheme
        if self.input_scale is not None:
            scale = self.input_scale
        else:
            scale = scheme.act_rule(scheme.act_granularity.reduce(absmax_rows(rows)))
        if scheme.act_may_overflow:
            self.overflowed += int((rows.float().abs() >= scheme.format.overflow * _column(scale)).sum())
        return scheme.format.scaled_round(rows, scale, scheme.overflow), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        operand, scale = self.quantize_input(rows)
        weight = self.scheme.format.decode(self.weight) if self.weight.dtype == torch.uint8 else self.weight
        if self.scheme.product == "exact":
            product = F.linear(operand.float(), weight.float())
        else:
            product = F.linear(operand, weight).float()
        product.mul_(_column(scale)).mul_(self.weight_scale)
        if self.bias is not None:
            product.add_(self.bias)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Moves like any module, but a change of type leaves the scales in float32 and the weight what it is."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        weight = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype != weight.dtype:
            self.weight = nn.Parameter(weight.to(self.weight.device), requires_grad=False)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved if moved.dtype == torch.float32 else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.scheme.format.name}, packed={self.weight.dtype == torch.uint8}"
