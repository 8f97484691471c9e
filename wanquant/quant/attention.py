"""Attention on 8-bit operands: Q, K and V rounded as they enter it, and optionally the probabilities too.

A processor in the sense of diffusers' attention interface; it takes the place of Wan's own and computes the same,
but for the rounding. The scales are powers of two, so they go into the BF16 operands exactly, and torch's own
attention then sees the values that 8-bit hardware would:

    Q, K   one scale per token and head: their product contracts over the head's channels
    V      one scale per head: its product contracts over the tokens, so a scale per token could not follow it
    P      softmax numerators exp(l - max), at most 1, with the fixed scale 1 / target's power of two; their sum, by
           which the product is divided, is that of the unrounded ones (``qkvp`` only)

The logits are float32 sums of exact products, as they are in hardware. ``product=fast`` takes the product with V in
BF16, ``product=exact`` in float32.

Differs from rounding the outputs of ``to_q``, ``to_k`` and ``to_v`` in that norm and rotary embedding come first, as
in the challenge and in OSP-Next (arXiv 2605.28691): what is rounded is what is multiplied. In training the gradient is
passed straight through the rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from wanquant.quant.scheme import Scheme

#: Float32 scores held at a time by ``qkvp``; queries are taken in as many chunks as that needs.
SCORES_AT_ONCE = 1 << 26
#: Tokens of the text behind a picture's: diffusers' Wan takes it to be so many.
TEXT = 512


class QuantAttention:
    """The processor. Refused: fused projections, another attention backend than torch's own, context parallelism.
    Where a picture's tokens come before the text's ``TEXT``, attention to them is taken apart and added, as in Wan."""

    # diffusers sets these on every processor that has them.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if getattr(attn, "fused_projections", False):
            raise ValueError("quantized attention takes separate projections")
        check_processor(self)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        picture, source = (None, source) if attn.add_k_proj is None else (source[:, :-TEXT], source[:, -TEXT:])
        dtype = hidden_states.dtype  # norms whose weights are in float32 give that, while they are trained
        query = attn.norm_q(attn.to_q(hidden_states)).to(dtype).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).to(dtype).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = (rotate(x, *rotary_emb) for x in (query, key))
        seen = [(key, attn.to_v(source).unflatten(2, (attn.heads, -1)))]
        if picture is not None:
            key = attn.norm_added_k(attn.add_k_proj(picture)).to(dtype).unflatten(2, (attn.heads, -1))
            seen.append((key, attn.add_v_proj(picture).unflatten(2, (attn.heads, -1))))
        query = query.transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):  # it would take float32 products in 16 bits
            parts = [self.mix(query, k.transpose(1, 2), v.transpose(1, 2), attention_mask) for k, v in seen]
        mixed = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        mixed = mixed.transpose(1, 2).flatten(2, 3).to(dtype)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed

    def mix(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of rounded operands, [batch, heads, tokens, channels]."""
        query, key, value = self.per_token(query), self.per_token(key), self.per_head(value)
        if self.scheme.attention == "qkvp":
            return self.attend(query, key, value, mask)
        if self.scheme.product == "exact":
            query, key, value = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(query, key, value, mask)

    def per_token(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, channels] rounded with a power of two for each of the channels' vectors."""
        return self._round_rows(x.reshape(-1, x.shape[-1])).view(x.shape)

    def per_head(self, x: torch.Tensor) -> torch.Tensor:
        return self._round_rows(x.reshape(x.shape[0] * x.shape[1], -1)).view(x.shape)

    def _round_rows(self, rows: torch.Tensor) -> torch.Tensor:
        format_ = self.scheme.act_format
        values, scales = format_.quantize_rows(rows.detach(), format_.target, True, self.scheme.act_overflow)
        return straight_through(rows, values * scales[:, None].to(torch.bfloat16))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """softmax(q kᵀ / √channels) v with rounded probabilities, [batch, heads, tokens, channels], BF16."""
        if mask is not None:
            raise ValueError("quantized attention probabilities take no mask")
        scheme = self.scheme
        batch, heads, queries, channels = query.shape
        scale = torch.tensor(2.0 ** -math.floor(math.log2(scheme.act_format.target)), device=query.device)
        chunk = max(1, SCORES_AT_ONCE // (batch * heads * key.shape[2]))
        parts = []
        for first in range(0, queries, chunk):
            scores = query[:, :, first : first + chunk].float() @ key.float().mT / math.sqrt(channels)
            numerators = (scores - scores.amax(-1, keepdim=True)).exp()
            rounded, _ = scheme.act_format.scaled_round(numerators.detach().flatten(0, 2), scale, scheme.act_overflow)
            weights = straight_through(numerators, rounded.view(numerators.shape), scale)
            if scheme.product == "exact":
                product = weights.float() @ value.float() * scale
            else:
                product = (weights @ value).float() * scale
            parts.append((product / numerators.sum(-1, keepdim=True)).to(torch.bfloat16))
        return torch.cat(parts, dim=2)


def straight_through(values: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``rounded``, in place of ``values`` or of values / scale; in training with their gradient, as if nothing were
    rounded."""
    if not (torch.is_grad_enabled() and values.requires_grad):
        return rounded
    passed: torch.Tensor = _PassThrough.apply(values if scale is None else values / scale, rounded)
    return passed


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.dtype = values.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].to(ctx.dtype), None


def check_processor(processor: Any) -> None:
    """``ValueError`` if diffusers runs this attention in a way the quantized one does not."""
    if type(processor).__name__ != "WanAttnProcessor" and not isinstance(processor, QuantAttention):
        raise ValueError(f"quantized attention is Wan's, and this one is run by {type(processor).__name__}")
    backend = getattr(processor, "_attention_backend", None)
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError("quantized attention does not run in parallel over the context")
    if backend is not None and str(backend).rpartition(".")[2].lower() != "native":
        raise ValueError(f"quantized attention runs on torch's own, not on {backend}")


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of neighbouring pairs of channels, as Wan has it; [..., heads, channels]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
