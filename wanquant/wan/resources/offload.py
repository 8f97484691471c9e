"""Which way a job is run on a card that may be too small for its model: what each needs, and the first that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanquant.wan.experts import parts_of
from wanquant.wan.resources.empty import parameters_of

if TYPE_CHECKING:
    from wanquant.wan.resources.estimate import ResourceEstimate

#: By how much a need may be exceeded, as a factor: predictions hold to a tenth.
MARGIN = 1.1


@dataclass(frozen=True)
class Needed:
    """Bytes on the device, and on the host beside it; on a CPU all are on the first."""

    card: int
    host: int

    def fits(self, card: int, host: int) -> bool:
        return MARGIN * self.card <= card and MARGIN * self.host <= host


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a job, each by itself.

    transformers  as they are loaded
    around        what of one transformer is outside its blocks
    block         the largest
    text_encoder  and of it ``text_layers``, the two largest that follow each other
    denoising     and ``decoding``: activations
    beside        what is quantized beside the model, and of it ``beside_block``
    folded        weights that smoothing changes where they are
    videos        decoded
    feeding       of error feedback: Hessians of as many blocks as are looked at together, or rounding by them
    """

    transformers: int
    around: int
    block: int
    text_encoder: int
    text_layers: int
    vae: int
    denoising: int
    decoding: int
    beside: int = 0
    beside_block: int = 0
    folded: int = 0
    videos: int = 0
    feeding: int = 0


def sizes_of(plan: ResourceEstimate) -> Sizes:
    blocks = plan.shape.blocks
    inside, (denoising, decoding) = parameters_of(blocks), plan.each_activations
    return Sizes(
        transformers=plan.weights,
        around=2 * (plan.parameters - inside) // len(parts_of(plan.shape)),
        block=math.ceil(plan.weights / plan.parameters * inside / len(blocks)),
        text_encoder=plan.text_encoder[0],
        text_layers=plan.text_encoder[1],
        vae=plan.vae,
        denoising=denoising,
        decoding=decoding,
        beside=plan.beside,
        beside_block=inside // len(blocks) if plan.counts.all_beside else 0,
        folded=2 * plan.quantized_weights if plan.scheme.smoothing is not None else 0,
        videos=plan.videos,
        feeding=plan.feeding,
    )


def ways_of(sizes: Sizes) -> dict[str, Needed]:
    """By the names of ``model.offload``, the quickest first. While a block runs the next one is brought; in pinned
    memory, in powers of two, both are once more on the host."""
    s = sizes
    whole = s.transformers + s.text_encoder + s.vae + max(s.denoising, s.decoding) + max(s.beside, s.feeding)
    running = s.around + 2 * s.block + max(s.beside_block, s.feeding) + s.denoising
    card, pinned = s.vae + max(s.text_layers, running, s.decoding), 3 * s.block
    return {
        "none": Needed(whole, s.videos),
        "group": Needed(card, s.transformers + s.text_encoder + s.beside + pinned + s.videos),
        # The text encoder is cast as it is loaded, and written then.
        "disk": Needed(card, max(s.text_encoder, pinned + s.folded + s.videos)),
    }


def on_host(sizes: Sizes) -> dict[str, Needed]:
    """The same where the host is the device: nothing is brought anywhere, and what lies in files can be given up."""
    s = sizes
    whole = Needed(ways_of(s)["none"].card + s.videos, 0)
    running = max(s.denoising + max(s.block * bool(s.beside_block), s.feeding), s.decoding) + s.folded + s.videos
    return {"none": whole, "group": whole, "disk": Needed(s.vae + max(s.text_encoder, running), 0)}


def choose_way(ways: Mapping[str, Needed], card: int, host: int) -> str | None:
    """The first that fits into so many free bytes; None if none does."""
    return next((name for name, needed in ways.items() if needed.fits(card, host)), None)


def larger(ways: Mapping[str, Needed], others: Mapping[str, Needed]) -> dict[str, Needed]:
    """The larger of both needs, of the ways that both have."""
    both = [(name, ways[name], others[name]) for name in ways if name in others]
    return {name: Needed(max(a.card, b.card), max(a.host, b.host)) for name, a, b in both}
