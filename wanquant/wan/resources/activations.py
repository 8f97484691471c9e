"""How many bytes a block keeps for its backward pass, found by running small ones.

What autograd keeps of a block is tensors of a row a token: of the video's, as wide as the model, as the feed-forward
part, or as there are heads; and of the text's, as wide as the model. So the bytes are

    rows · (tokens · (a heads + b ffn + c) + text · (d heads + e))  +  2 bytes a weight, which is multiplied in BF16

and a handful of blocks of one or two heads tell the coefficients. Attention that holds its scores is not linear in the
tokens; torch's own is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

#: (video latents as (frames, rows, columns) of patches, text tokens) of the small blocks.
SMALL, TALL, TEXT = (1, 2, 2), (1, 2, 4), (4, 8)
FFN = 64


@dataclass(frozen=True)
class Kept:
    """Bytes a token: of the video a · heads + b · ffn + c, of the text d · heads + e."""

    by_head: float
    by_ffn: float
    by_token: float
    text_by_head: float
    text_by_token: float

    def bytes(self, heads: int, ffn: int, tokens: int, text: int) -> int:
        """Of one row of a batch, in one block, without the weights."""
        video = tokens * (self.by_head * heads + self.by_ffn * ffn + self.by_token)
        return round(video + text * (self.text_by_head * heads + self.text_by_token))


def kept_by(config: dict[str, Any], prepare: Callable[[nn.Module], None], precision: str) -> Kept:
    """``config`` is the transformer's; ``prepare`` makes a float32 transformer of one block what is trained."""

    def measure(heads: int, ffn: int, size: tuple[int, int, int], text: int) -> int:
        small = {
            **config,
            "num_layers": 1,
            "num_attention_heads": heads,
            "ffn_dim": ffn,
            "text_dim": 32,
            "freq_dim": 32,
        }
        with torch.random.fork_rng(devices=[]):
            transformer = WanTransformer3DModel.from_config(small)
        prepare(transformer)
        return _kept(transformer, size, text, precision)

    def per_token(heads: int, ffn: int) -> float:
        return (measure(heads, ffn, TALL, TEXT[0]) - measure(heads, ffn, SMALL, TEXT[0])) / 4

    def per_text(heads: int) -> float:
        return (measure(heads, FFN, SMALL, TEXT[1]) - measure(heads, FFN, SMALL, TEXT[0])) / (TEXT[1] - TEXT[0])

    one, two, wide = per_token(1, FFN), per_token(2, FFN), per_token(1, 2 * FFN)
    by_head, by_ffn = two - one, (wide - one) / FFN
    text_one, text_two = per_text(1), per_text(2)
    return Kept(by_head, by_ffn, one - by_head - by_ffn * FFN, text_two - text_one, 2 * text_one - text_two)


@contextmanager
def mixed_norms() -> Iterator[None]:
    """Without torch's warning that a norm's weight is in float32 and its input is not, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def _kept(transformer: WanTransformer3DModel, size: tuple[int, int, int], text: int, precision: str) -> int:
    """Bytes autograd keeps of the block, each storage once, without its parameters."""
    block = transformer.blocks[0].requires_grad_(True)
    frames, rows, columns = size
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    rotary = transformer.rope(torch.zeros(1, 1, frames, 2 * rows, 2 * columns))
    hidden = torch.zeros(1, frames * rows * columns, width, dtype=kind, requires_grad=True)
    own = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with (
        mixed_norms(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = block(hidden, torch.zeros(1, text, width, dtype=kind), torch.zeros(1, 6, width), rotary)
    kept = sum(storage.nbytes() for storage in seen.values())
    del output
    return kept
