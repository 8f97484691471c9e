"""What running a model takes of memory besides its weights: of the forward pass, and of one that is to be trained.

Forward, the real modules run op by op on torch's fake tensors, which have shapes, types and storages and no memory, and
what is alive at once is counted. Two blocks stand for all, since each frees what it took. What a kernel takes inside of
an op is not seen: other layouts of a convolution's input, a workspace.

For the backward pass autograd keeps tensors of a row a token: of the video's, as wide as the model, as the feed-forward
part, or as there are heads; and of the text's, as wide as the model. So the bytes that it keeps of a block are

    rows · (tokens · (a heads + b ffn + c) + text · (d heads + e))  +  2 bytes a weight, which is multiplied in BF16

and a handful of blocks of one or two heads tell the coefficients. Attention that holds its scores is not linear in the
tokens; torch's own is.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanquant.kernels.ops import EAGER, find
from wanquant.quant.feedback import HessianObserver
from wanquant.wan.config import GenerationConfig
from wanquant.wan.families import WAN, Family, block_names
from wanquant.wan.products import quick_products
from wanquant.wan.resources.empty import (
    USUAL,
    Given,
    Quantized,
    block_inputs,
    empty_transformer,
    empty_vae,
    fill,
    linears_in,
    tokens_of,
    vae_of,
)

#: Of the small blocks that are trained: tokens of the video and of the text, fewer and more, and the width of the
#: feed-forward part.
TOKENS, TEXT, FFN = (4, 8), (4, 8), 64

P = ParamSpec("P")
R = TypeVar("R")


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages made while entered that are still alive, and the ``most`` there were. Our own
    kernels need nothing more, unless they are ``EAGER``, plain torch."""

    def __init__(self, known: Sequence[torch.Tensor], eagerly: bool = False) -> None:
        super().__init__()
        self.most: int = 0
        self._eagerly = eagerly
        self._now = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._eagerly and op.namespace == "wanquant":
            with self:
                return find(op.name().split("::")[1].split(".")[0], EAGER)(*args, **(kwargs or {}))
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.most = max(self.most, self._now)
                    weakref.finalize(storage, self._released, storage._cdata)
        return output

    def _released(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


def once(function: Callable[P, R]) -> Callable[P, R]:
    """Kept for the process: the jobs of a sweep are planned one by one, and most of what they are is the same."""
    known: dict[str, R] = {}

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        key = repr((given, named))
        if key not in known:
            known[key] = function(*given, **named)
        return known[key]

    return call


def runs_on(how: Quantized | None, device: torch.device) -> Quantized | None:
    """On the CPU, a product of another device replaced by the fast one."""
    if how is None or device.type != "cpu" or how.scheme.product in ("fast", "exact"):
        return how
    return replace(how, scheme=replace(how.scheme, product="fast"))


def _fake(how: Quantized | None, device: torch.device) -> Quantized | None:
    """As fake tensors of the CPU stand for it: products that the device takes otherwise are replaced by the fast one.
    Codes for a card's FP8 units are no more than its operands."""
    if how is None or how.scheme.product == "int8" or (device.type == "cpu" and how.scheme.product != "native"):
        return how
    return replace(how, scheme=replace(how.scheme, product="fast"))


@once
def denoising_bytes(
    config: dict[str, Any],
    how: Quantized | None,
    settings: GenerationConfig,
    rows: int,
    device: torch.device,
    given: Given = USUAL,
) -> int:
    """Of one forward pass of a transformer of this config, on ``rows`` videos."""
    transformer = empty_transformer(config, _fake(how, device), 2, given.family)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), quick_products(device):
        fill(transformer, torch.empty)
        inputs = given.inputs(config, settings, rows, torch.empty)
        known = [*transformer.parameters(), *transformer.buffers()]
        alive = Alive(known, eagerly=device.type not in ("cpu", "cuda"))
        with alive:
            transformer(**inputs, return_dict=False)
    if how is None or how.scheme.product != "exact" or device.type == "cpu":
        return alive.most
    plain = empty_transformer(config, None, 1, given.family)
    widest: int = max(plain.get_submodule(name).out_features for name in linears_in(plain, how.names))
    return (
        alive.most + 2 * rows * tokens_of(settings, plain, given) * widest
    )  # the product is in float32, of operands in BF16


@once
def hessian_bytes(
    config: dict[str, Any], names: Sequence[str], settings: GenerationConfig, given: Given = USUAL
) -> int:
    """Of the Hessians of a block's inputs, those of its linears of these ``names``; of the largest kind of block."""
    transformer, small = empty_transformer(config, None, 1, given.family), replace(settings, num_frames=1)
    found = []
    for block in block_names(transformer):
        linears = [name for name in linears_in(transformer, names) if name.startswith(f"{block}.")]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), HessianObserver(transformer, linears) as seen:
            fill(transformer, torch.empty)
            transformer(**given.inputs(config, small, 1, torch.empty), return_dict=False)
            found.append(seen.nbytes)
    return max(found)


def decoding_bytes(folder: Path, settings: GenerationConfig, family: Family = WAN) -> int:
    """Of decoding one video with the VAE of this folder."""
    vae = empty_vae(folder, family)
    size, tile, beside = family.latents(vae.config, settings), family.tile(vae), 0
    if any(length > most for length, most in zip(size, tile, strict=True)):
        size = tuple(map(min, size, tile))  # type: ignore[assignment]
        beside = 2 * 12 * settings.num_frames * settings.height * settings.width  # what tiles gave, and joined
    return beside + _vae_bytes(dict(vae.config), family, "decode", (family.channels(vae.config), *size))


def encoding_bytes(folder: Path, settings: GenerationConfig, frames: int) -> int:
    """Of encoding so many frames, which a picture is the first of."""
    return _vae_bytes(dict(empty_vae(folder).config), WAN, "encode", (3, frames, settings.height, settings.width))


@once
def _vae_bytes(config: dict[str, Any], family: Family, what: str, size: tuple[int, ...]) -> int:
    vae = vae_of(config, family)
    with FakeTensorMode(), torch.no_grad():
        fill(vae, torch.empty)
        alive, given = Alive([*vae.parameters(), *vae.buffers()]), torch.empty(1, *size)
        with alive:
            getattr(vae, what)(given, return_dict=False)
    return alive.most


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

    def measure(heads: int, ffn: int, tokens: int, text: int) -> int:
        sizes = {"num_layers": 1, "num_attention_heads": heads, "ffn_dim": ffn, "text_dim": 32, "freq_dim": 32}
        with torch.random.fork_rng(devices=[]):
            transformer = WanTransformer3DModel.from_config({**config, **sizes})
        prepare(transformer)
        return _kept(transformer, tokens, text, precision)

    def per_token(heads: int, ffn: int) -> float:
        few, many = (measure(heads, ffn, tokens, TEXT[0]) for tokens in TOKENS)
        return (many - few) / (TOKENS[1] - TOKENS[0])

    def per_text(heads: int) -> float:
        few, many = (measure(heads, FFN, TOKENS[0], text) for text in TEXT)
        return (many - few) / (TEXT[1] - TEXT[0])

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


def _kept(transformer: WanTransformer3DModel, tokens: int, text: int, precision: str) -> int:
    """Bytes autograd keeps of the block, each storage once, without its parameters."""
    block = transformer.blocks[0].requires_grad_(True)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    given = block_inputs(transformer, 1, tokens, text, kind, torch.device("cpu"))
    given[0].requires_grad_(True)
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
        output = block(*given)
    kept = sum(storage.nbytes() for storage in seen.values())
    del output
    return kept
