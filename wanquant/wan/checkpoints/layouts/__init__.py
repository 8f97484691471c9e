"""Layouts of other engines that our checkpoints are exported in (``wanquant.wan.checkpoints.export``).

Which there are is said here, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The names its tensors can have, the usual ones first, and whether the target is a whole pipeline again, with the
    source's files of weights; of other layouts it is a file of weights a transformer."""

    namings: tuple[str, ...]
    whole: bool


LAYOUTS = {
    "bf16": Layout(("diffusers",), True),
    "comfyui": Layout(("original", "prefixed"), False),
    "compressed-tensors": Layout(("diffusers",), True),
    "modelslim": Layout(("diffusers",), True),
    "mindie-sd": Layout(("diffusers", "original"), False),
}
NAMINGS = ("diffusers", "original", "prefixed")


def naming_of(layout: str, naming: str | None) -> str:
    """The naming asked for, or the layout's usual one; ``ValueError`` for what there is not."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    known = LAYOUTS[layout].namings
    if naming is not None and naming not in known:
        raise ValueError(f"naming {naming!r}: layout {layout} has {' or '.join(known)} names")
    return naming or known[0]
