"""The quantized linear while it is trained: master weights, rounded anew in every forward pass.

Forward is ``QuantLinear``'s to the bit, of the weights as they are now. Backward is that of the straight-through
surrogate (Bengio et al. 2013), in which rounding adds a constant and a scale is one:

    y = (x + [x̂ - x]) (w + [ŵ - w])ᵀ + b        x̂ = s_x Q(x / s_x),  ŵ = s_w Q(w / s_w),  [·] constant
    dx = dy ŵ,  dw = dyᵀ x̂,  db = sum of dy over rows

so the products of the backward pass have quantized operands too, as OSP-Next takes them (arXiv 2605.28691). With a clip
mask the surrogate is constant where a value fell beyond the format's range, and there is no gradient there.

A scale that is learned (LSQ, arXiv 1902.08153) is s exp(g) with g = 0 at first, so that a learning rate means the same
for all of them. The surrogate's derivative is that of s Q(v), v = w / s, with Q passed straight through:

    dg = s Σ dŵ (Q(v) - v)          where v is beyond the range, and has no gradient by the mask, s Σ dŵ Q(v)

Gradients may be quantized as hardware would take them, by the largest magnitude of each operand to ``GRADIENT_TARGET``:
dy goes into the product for dx with the weight's scale in it, and into that for dw with the input's, because a scale
of the dimension that is summed over cannot wait until after the product.

*Delayed* scaling takes an input's scale from the largest magnitudes of the last steps and not from the input itself
(arXiv 2605.26189): ``advance`` ends a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wanquant import kernels
from wanquant.formats import hif8
from wanquant.kernels.products import bf16_linear
from wanquant.quant.config import Training as Training
from wanquant.quant.last_input import LastInput
from wanquant.quant.linear import QuantLinear
from wanquant.quant.product import take_product
from wanquant.quant.scale import Direct, SearchedRule
from wanquant.quant.scheme import Rounded, Scheme
from wanquant.quant.site import Site

#: What the largest magnitude of a gradient becomes: the zone of two mantissa bits (OSP-Next, MindSpeed).
GRADIENT_TARGET = 224.0


def check_trainable(scheme: Scheme, how: Training) -> None:
    """``ValueError`` names what cannot be trained: smoothing, rotation, low-rank branches, error feedback,
    delayed scales that have no use."""
    if scheme.smoothing is not None:
        raise ValueError("quant.smoothing cannot be trained: its factors are found for the weights as they were")
    if scheme.rotation is not None or scheme.low_rank:
        method = "rotation" if scheme.rotation is not None else "low_rank"
        raise ValueError(f"quant.{method} cannot be trained: quantize with it what was trained without")
    if scheme.act_steps > 1:
        raise ValueError(f"quant.activations.steps={scheme.act_steps} cannot be trained: training has one scale")
    if scheme.feedback:
        raise ValueError("quant.weights.feedback=true cannot be trained: it fits the weights as they were")
    if scheme.product not in ("fast", "exact"):
        raise ValueError(f"quant.product={scheme.product} cannot be trained: choose fast or exact")
    if how.gradients != "none" and scheme.format.name != "hif8":
        raise ValueError(f"gradients={how.gradients} are rounded to HiF8, and quant.format is {scheme.format.name}")
    if how.scaling == "delayed":
        if not scheme.act_static:
            raise ValueError("scaling=delayed makes static scales: set quant.activations.static=true")
        if isinstance(scheme.act_rule, SearchedRule | Direct):  # no target for the history's maximum
            rule = scheme.config.activations.rule
            raise ValueError(f"scaling=delayed needs quant.activations.rule=amax or pow2, not {rule}")


class TrainableQuantLinear(nn.Linear):
    """Takes the place of an ``nn.Linear`` while it is trained.

    weight, bias  float32 [out, in], [out]: the master copies, to which an optimizer adds; BF16 if they are not trained
    initial_scale float32 [out] or []: where the scales are learned, or were searched for and stay
    weight_gain   float32, in its shape: learned scales are initial_scale · exp(weight_gain)
    input_scale   float32 [], with static activations only
    input_gain    float32 []: as weight_gain
    history       float32 [window]: with delayed scaling the largest magnitudes of the last steps, the newest last
    seen          float32 []: with delayed scaling the largest magnitude of the inputs since the last ``advance``
    clipped       int64 []: elements of all inputs so far that fell beyond the range; clipped_weights: of the weight, in
                  the last forward pass
    counting      False where a forward pass is taken again
    quantizing    False for a warm-up in BF16
    """

    initial_scale: torch.Tensor | None
    weight_gain: nn.Parameter | None
    input_scale: torch.Tensor | None
    input_gain: nn.Parameter | None
    history: torch.Tensor

    def __init__(
        self,
        linear: nn.Linear,
        scheme: Scheme,
        seen: float | Site | None = None,
        how: Training | None = None,
        last: LastInput | None = None,
    ) -> None:
        """From a linear in float32 or BF16. ``seen`` is its input in calibration, which static schemes and some rules
        need; ``last`` is shared by the layers of a model."""
        how = how or Training()
        check_trainable(scheme, how)
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.scheme, self.how, self.quantizing = scheme, how, True
        self._last = last or LastInput()
        device, dtype = linear.weight.device, torch.float32 if how.weights else torch.bfloat16
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), how.weights)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), how.weights)
        base, scale = None, scheme.input_scale(seen, device)
        if how.learn_scales or isinstance(scheme.weight_rule, SearchedRule):
            base = scheme.quantize_weight(self.weight.detach().to(torch.bfloat16), seen)[1]
        for name, gain, found in (("initial_scale", "weight_gain", base), ("input_scale", "input_gain", scale)):
            self.register_buffer(name, found)
            learned = nn.Parameter(torch.zeros_like(found)) if how.learn_scales and found is not None else None
            self.register_parameter(gain, learned)
        if how.scaling == "delayed":
            assert seen is not None
            largest = seen.largest() if isinstance(seen, Site) else float(seen)
            self.register_buffer("history", torch.zeros(how.window, device=device))
            self.history[-1] = largest
            self.seen = torch.zeros((), device=device)
        # No buffers: of those several processes would all have the first one's.
        self.clipped = self.clipped_weights = torch.zeros((), dtype=torch.int64, device=device)
        self.counting = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of(x, self.weight)

    def of(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Forward with another weight than its own: with what an adapter adds to it."""
        if self.how.scaling == "delayed":
            self.seen = torch.maximum(self.seen.to(x.device), x.detach().abs().amax().float())
        if not self.quantizing:
            return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features)
        if self.input_scale is None:
            rounded = self._last.rounded(x, lambda: self.scheme.quantize_input(rows.detach(), None))
        else:
            rounded = self.scheme.quantize_input(rows.detach(), _gained(self.input_scale, self.input_gain))
        gains = self.weight_gain, self.input_gain
        y: torch.Tensor = _StraightThrough.apply(rows, weight, self.bias, *gains, rounded, self)
        return y.view(*x.shape[:-1], self.out_features)

    def rounded_weight(self, source: torch.Tensor) -> Rounded:
        """Of a weight in BF16, by scales taken from it now, or by the initial ones times their gain."""
        if self.initial_scale is None:
            return self.scheme.quantize_weight(source)
        scale = _gained(self.initial_scale, self.weight_gain)
        rounded, over = self.scheme.format.scaled_round(source, scale, self.scheme.overflow)
        return rounded, scale, over

    @torch.no_grad()
    def advance(self, largest: torch.Tensor) -> None:
        """Ends a step of delayed scaling: ``largest`` (``seen``, over all processes) joins the history, whose maximum
        is the next step's scale. One that is not finite makes the scale NaN, so that a broken input is not repaired."""
        assert self.input_scale is not None
        assert not isinstance(self.scheme.act_rule, SearchedRule)
        self.history.copy_(torch.cat([self.history[1:], largest.view(1)]))
        self.input_scale.copy_(self.scheme.act_rule(self.history.amax()))
        self.seen = torch.zeros_like(self.history[0])

    @torch.no_grad()
    def frozen(self) -> QuantLinear:
        """What inference runs, computing what this computes."""
        source = self.weight.detach().to(torch.bfloat16)
        static = None if self.input_scale is None else _gained(self.input_scale, self.input_gain).clone()
        return QuantLinear.assembled(self.scheme, self.rounded_weight(source), self.bias, static)


def _gained(scale: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return scale if gain is None else scale * gain.detach().exp()


def _over_rows(scale: torch.Tensor) -> torch.Tensor:
    """[rows] as a column, to divide a matrix by; [] as it is."""
    return scale[:, None] if scale.ndim else scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_gain: torch.Tensor | None,
        input_gain: torch.Tensor | None,
        rounded: Rounded,
        layer: TrainableQuantLinear,
    ) -> torch.Tensor:
        scheme, how = layer.scheme, layer.how
        source = weight.to(torch.bfloat16)
        x, x_scale, x_over = rounded
        w, w_scale, w_over = layer.rounded_weight(source)
        if layer.counting:
            layer.clipped_weights = torch.zeros_like(layer.clipped) if w_over is None else w_over
            layer.clipped = layer.clipped if x_over is None else layer.clipped + x_over
        sides = (rows, x_scale, x_over, scheme.act_format), (source, w_scale, w_over, scheme.format)
        ctx.masks = [
            (values.float() / _over_rows(scale)).abs() < kind.overflow if how.clip_mask and over is not None else None
            for values, scale, over, kind in sides
        ]
        # What was rounded is needed again only where the scale is learned.
        kept = rows if input_gain is not None else None, source if weight_gain is not None else None
        ctx.save_for_backward(x, x_scale, w, w_scale, *kept)
        ctx.exact, ctx.has_bias, ctx.gradients = scheme.product == "exact", bias is not None, how.gradients
        bias16 = None if bias is None else bias.to(torch.bfloat16)
        with torch.autocast(rows.device.type, enabled=False):  # it would take the exact product in 16 bits
            return take_product((x, x_scale), (w, w_scale), bias16, scheme, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        x, x_scale, w, w_scale, rows, source = ctx.saved_tensors
        wants_x, wants_w, wants_b, wants_weight_gain, wants_input_gain = ctx.needs_input_grad[:5]
        grad_x = grad_w = grad_b = grad_wg = grad_xg = None
        with torch.autocast(grad.device.type, enabled=False):
            if wants_x or wants_input_gain:
                product = _product(grad, w_scale, w, ctx).to(grad.dtype)
                grad_x, grad_xg = _through_rounding(product, x, rows, x_scale, ctx.masks[0])
            if wants_w or wants_weight_gain:
                product = _product(grad.T, x_scale, x, ctx).float()
                grad_w, grad_wg = _through_rounding(product, w, source, w_scale, ctx.masks[1])
            if ctx.has_bias and wants_b:
                grad_b = grad.float().sum(0)
        return grad_x, grad_w if wants_w else None, grad_b, grad_wg, grad_xg, None, None


def _through_rounding(
    grad: torch.Tensor,
    rounded: torch.Tensor,
    source: torch.Tensor | None,
    scale: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From the gradient of an operand's s Q(v) that of the operand and, if ``source`` = s v is given, of its gain.
    Where ``mask`` is false, Q is constant."""
    of_gain = None
    if source is not None:
        v = source.float() / _over_rows(scale)
        part = grad.float() * (rounded.float() - (v if mask is None else torch.where(mask, v, 0.0)))
        of_gain = scale * (part.sum(1) if scale.ndim else part.sum())
    return grad if mask is None else grad * mask, of_gain


def _product(grad: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, ctx: Any) -> torch.Tensor:
    """(grad · scale) @ values; the scale is that of the dimension summed over. In BF16 it goes into whichever operand
    is the smaller, or exactly into float32."""
    if ctx.gradients != "none":
        return _quantized_product(grad * scale, values, ctx)
    if ctx.exact:
        return F.linear(grad.float() * scale, values.T.float())
    if values.numel() < grad.numel():
        scaled = torch.empty_like(values)
        torch.mul(values, _over_rows(scale), out=scaled)
        return bf16_linear(grad.to(torch.bfloat16), scaled.T)
    return bf16_linear((grad * scale).to(torch.bfloat16), values.T)


def _quantized_product(scaled: torch.Tensor, values: torch.Tensor, ctx: Any) -> torch.Tensor:
    """With the gradient in HiF8, by one scale for all of it."""
    scale = kernels.absmax_to_scale(scaled.abs().amax().float(), GRADIENT_TARGET, False)
    divided = scaled.float() / scale
    rounded = hif8.round_stochastic(divided) if ctx.gradients == "stochastic" else hif8.round(divided)
    if ctx.exact:
        return F.linear(rounded.float(), values.T.float()) * scale
    return bf16_linear(rounded.to(torch.bfloat16), values.T).float() * scale


def trainable_linears(module: nn.Module) -> dict[str, TrainableQuantLinear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, TrainableQuantLinear)}
