"""Chooses where a job's weights wait, from what it needs and from the memory that is free, and says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from wanquant.wan.device import free_memory
from wanquant.wan.resources.estimate import ResourceEstimate
from wanquant.wan.resources.offload import MARGIN, Needed, choose_way, larger
from wanquant.wan.resources.printed import in_bytes

WAITS = {
    "none": "on the device",
    "group": "on the host, brought block by block",
    "disk": "in files, brought block by block",
}


def choose(
    needs: ResourceEstimate, asked: str, training: Mapping[str, Needed] | None = None
) -> tuple[ResourceEstimate, str]:
    """The estimate with the way that ``asked`` says, or the first that fits; and what to say of it, if anything.
    ``training`` is what a training needs besides. ``ValueError`` where a card is too small for every way."""
    ways = needs.ways if training is None else larger(needs.ways, training)
    on_host, (card, host) = needs.device.type == "cpu", free_memory(needs.device)
    way = choose_way(ways, card, host) if asked == "auto" else asked
    if way is None and not on_host:
        raise ValueError(too_small(ways, card, host))
    if way is None:
        name, least = list(ways.items())[-1]
        line = f"offload     no way fits: model.offload={name}, the least, needs {_of(least.card, card)}"
        return dataclasses.replace(needs, offload="none"), f"{line}; what follows is with all weights in memory"
    chosen = dataclasses.replace(needs, offload=way)
    if chosen.hessian:  # of as many more blocks as what is left holds
        more = int(card / MARGIN - ways[way].card) // chosen.hessian
        chosen = dataclasses.replace(chosen, hessian_blocks=min(1 + max(more, 0), len(chosen.shape.blocks)))
        ways = chosen.ways if training is None else larger(chosen.ways, training)
    return chosen, "" if on_host and chosen.offload == "none" else told(chosen.offload, ways, card, host)


def told(way: str, ways: Mapping[str, Needed], card: int, host: int) -> str:
    """One line: what the way needs beside what is free, and what it would be with all on the device."""
    needed = ways[way]
    line = f"offload     {way}: weights wait {WAITS[way]}; {_of(needed.card, card)}"
    if needed.host:
        line += f", on the host {_of(needed.host, host)}"
    return line + (f"; all of it on the device {in_bytes(ways['none'].card)}" if way != "none" else "")


def too_small(ways: Mapping[str, Needed], card: int, host: int) -> str:
    least = list(ways.values())[-1]
    needed = f"{_of(least.card, card)}, on the host {_of(least.host, host)}"
    return (
        f"model.offload=auto: no way fits, the least needs {needed}: generate fewer or smaller frames, or try "
        f"one of {', '.join(ways)} nevertheless"
    )


def _of(needed: int, free: int) -> str:
    return f"{in_bytes(needed)} of {in_bytes(free)} free"
