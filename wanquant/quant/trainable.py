"""The quantized linear while it is trained: float32 master weights, rounded anew in every forward pass.

Forward is ``QuantLinear``'s to the bit, of the weights as they are now. Backward is that of the straight-through
surrogate (Bengio et al. 2013), in which rounding adds a constant and a scale is one:

    y = (x + [x̂ - x]) (w + [ŵ - w])ᵀ + b        x̂ = s_x Q(x / s_x),  ŵ = s_w Q(w / s_w),  [·] constant
    dx = dy ŵ,  dw = dyᵀ x̂,  db = sum of dy over rows

so the products of the backward pass have quantized operands too, as OSP-Next takes them (arXiv 2605.28691). With a clip
mask the surrogate is constant where a value fell beyond the format's range, and there is no gradient there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wanquant.quant.config import Scheme
from wanquant.quant.linear import QuantLinear, quantize_weight, take_product
from wanquant.quant.scale import Ema, LeastError, PerBlock, Percentile, quantize_matrix
from wanquant.quant.search import static_step
from wanquant.quant.statistics import Site


class TrainableQuantLinear(nn.Linear):
    """Takes the place of an ``nn.Linear`` while its weights are trained.

    weight, bias  float32 [out, in], [out]: the master copies, to which an optimizer adds
    input_scale   float32 [], with static activations only
    clip_mask     whether what falls beyond the range has no gradient
    clipped       int64 []: such elements of all inputs and weights so far
    """

    input_scale: torch.Tensor | None
    clipped: torch.Tensor

    def __init__(
        self, linear: nn.Linear, scheme: Scheme, seen: float | Site | None = None, clip_mask: bool = True
    ) -> None:
        """From a linear in float32 or BF16, with all of its weights trainable. ``ValueError`` names what cannot be
        trained: a format with blocks, smoothing, and weights' steps that are searched for."""
        if isinstance(scheme.weight_granularity, PerBlock):
            raise ValueError(f"{scheme.format.name} cannot be trained: its steps go into the operands")
        if scheme.smoothing is not None:
            raise ValueError("quant.smoothing cannot be trained: its factors are found for the weights as they were")
        if isinstance(scheme.weight_rule, Percentile | Ema | LeastError):
            raise ValueError(
                f"quant.weights.rule={scheme.config.weights.rule} is searched for, which no step can wait for"
            )
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.scheme, self.clip_mask = scheme, clip_mask
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())  # type: ignore[assignment]
        scale = None
        if scheme.act_static:
            assert seen is not None, "a static scheme needs a calibrated input"
            scale = static_step(scheme.act_rule, seen, scheme.format, scheme.overflow).to(linear.weight.device)
        self.register_buffer("input_scale", scale)
        self.register_buffer(
            "clipped", torch.zeros((), dtype=torch.int64, device=linear.weight.device), persistent=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor = _StraightThrough.apply(rows, self.weight, self.bias, self)
        return y.view(*x.shape[:-1], self.out_features)

    def rounded_input(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """BF16 values on the grid, their scale, and how many overflowed (None: none could)."""
        scheme = self.scheme
        if self.input_scale is not None:
            operand, over = scheme.format.scaled_round(rows, self.input_scale, scheme.overflow)
            return operand, self.input_scale, over
        assert not isinstance(scheme.act_rule, Percentile | Ema | LeastError), "parse lets none be dynamic"
        return quantize_matrix(rows, scheme.act_granularity, scheme.act_rule, scheme.format, scheme.overflow)

    def frozen(self) -> QuantLinear:
        """What inference runs, computing what this computes."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        found = QuantLinear.from_linear(plain, self.scheme, 1.0 if self.input_scale is not None else None)
        if self.input_scale is not None:
            found.input_scale = self.input_scale.clone()
        return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: TrainableQuantLinear
    ) -> torch.Tensor:
        scheme = layer.scheme
        source = weight.to(torch.bfloat16)
        w, w_scale, w_over = quantize_weight(source, scheme, None, None)
        x, x_scale, x_over = layer.rounded_input(rows)
        layer.clipped += sum(over for over in (w_over, x_over) if over is not None)
        ctx.masks = [
            _in_range(values, scale, scheme.format.overflow) if layer.clip_mask and over is not None else None
            for values, scale, over in ((rows, x_scale, x_over), (source, w_scale, w_over))
        ]
        ctx.save_for_backward(x, x_scale, w, w_scale)
        ctx.exact, ctx.has_bias = scheme.product == "exact", bias is not None
        bias16 = None if bias is None else bias.to(torch.bfloat16)
        return take_product(x, x_scale, w, w_scale, bias16, scheme, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The scale of the dimension that is summed over goes into the gradient, the other one behind the product."""
        (grad,) = grads
        x, x_scale, w, w_scale = ctx.saved_tensors
        dtype = torch.float32 if ctx.exact else torch.bfloat16
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = F.linear((grad * w_scale).to(dtype), w.T.to(dtype)).to(grad.dtype)
            grad_x = grad_x if ctx.masks[0] is None else grad_x * ctx.masks[0]
        if ctx.needs_input_grad[1]:
            scaled = grad * (x_scale[:, None] if x_scale.ndim else x_scale)
            grad_w = F.linear(scaled.T.to(dtype), x.T.to(dtype)).float()
            grad_w = grad_w if ctx.masks[1] is None else grad_w * ctx.masks[1]
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = grad.float().sum(0)
        return grad_x, grad_w, grad_b, None


def _in_range(values: torch.Tensor, scale: torch.Tensor, overflow: float) -> torch.Tensor:
    return (values.float() / (scale[:, None] if scale.ndim else scale)).abs() < overflow
