"""Calibration statistics: what passed through a model, by place, denoising-step bin and guidance branch.

Collected online by forward hooks, merged exactly, and stored as ``statistics.safetensors`` (the figures) and
``statistics.json`` (what they are of).

Statistics merged from parts are equal, bit for bit, to those of one pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from wanquant.kernels import absmax_rows
from wanquant.kernels.observe_loop import LOWEST, PER_OCTAVE
from wanquant.kernels.statistics import BINS, DYNAMIC_RULES, HIGHEST, Observed, observe_rows
from wanquant.quant.site import Layout as Layout
from wanquant.quant.site import Place
from wanquant.quant.site import Site as Site
from wanquant.quant.steps import place_of_timestep, takes_timestep, timestep_in

INPUT, OUTPUT, RESIDUAL = "input", "output", "residual"
BRANCHES = ("cond", "uncond")
ARRAYS, DESCRIPTION = "statistics.safetensors", "statistics.json"
#: What the arrays in files mean: other versions are not read, and those with other bins or rules are others.
KIND = {
    "version": 3,
    "histogram": {"bins_per_octave": PER_OCTAVE, "lowest": LOWEST, "highest": HIGHEST},
    "rules": [rule.name for rule in DYNAMIC_RULES],
}


@dataclass
class Statistics:
    """All sites of a model by name, ``blocks.3.attn1.to_q:input`` or ``blocks.3:residual``."""

    layout: Layout
    sites: dict[str, Site] = field(default_factory=dict)

    def site(self, name: str, kind: str) -> Site:
        return self.sites[f"{name}:{kind}"]

    def inputs(self) -> dict[str, Site]:
        """The sites of linears' inputs, by the linear's full name."""
        return {name.removesuffix(f":{INPUT}"): site for name, site in self.sites.items() if name.endswith(f":{INPUT}")}

    def input_absmax(self) -> dict[str, float]:
        """Largest magnitude of each linear's input; NaN if a NaN passed."""
        return {name: site.largest() for name, site in self.inputs().items()}

    def rows(self) -> dict[str, int]:
        """Rows that entered each linear."""
        return {name: int(site.rows.sum()) for name, site in self.inputs().items()}

    def block_inputs(self, block: int) -> dict[str, Site]:
        """Those inputs of the linears inside one block."""
        return {name: site for name, site in self.inputs().items() if name.startswith(f"blocks.{block}.")}

    def own_inputs(self, block: int) -> dict[str, Site]:
        """Of those, what is not the same in another block: the text that cross-attention reads says nothing of one."""
        everywhere: dict[str, list[Site]] = {}
        for name, site in self.inputs().items():
            if name.startswith("blocks.") and not name.startswith(f"blocks.{block}."):
                everywhere.setdefault(name.split(".", 2)[2], []).append(site)

        def is_shared(name: str, site: Site) -> bool:
            others = everywhere.get(name.split(".", 2)[2], [])
            return any(np.array_equal(site.absmax, other.absmax, equal_nan=True) for other in others)

        return {name: site for name, site in self.block_inputs(block).items() if not is_shared(name, site)}

    def coverage(self) -> list[str]:
        """How many videos, steps, branches, tokens and sites were seen, in a line; and a warning for each bin and
        branch in which nothing passed."""
        layout = self.layout
        tokens = max((int(site.rows.sum()) for site in self.sites.values()), default=0)
        calls = sum(site.calls for site in self.sites.values()) if self.sites else np.zeros((1, 1, 1))
        seen = np.asarray(calls) > 0
        branches = [name for place, name in enumerate(BRANCHES[: layout.branches]) if seen[:, :, place].any()]
        bins = np.array([layout.bin_of(step) for step in range(layout.steps)])
        return [
            f"{int(seen.any((1, 2)).sum())} of {len(layout.videos)} videos, {int(seen.any((0, 2)).sum())} of "
            f"{layout.steps} steps in {layout.bins} bins, branches {' and '.join(branches) or 'none'}, "
            f"{tokens:,} tokens, {len(self.sites)} sites",
            *(
                f"warning: nothing seen in step bin {bin_}, branch {BRANCHES[branch]}"
                for bin_ in range(layout.bins)
                for branch in range(layout.branches)
                if not seen[:, bins == bin_, branch].any()
            ),
        ]

    def merged(self, other: Statistics) -> Statistics:
        """Of the videos of both, ours first. ``ValueError`` unless all else is the same and no video is in both."""
        same = replace(self.layout, videos=()) == replace(other.layout, videos=())
        if not same or self.sites.keys() != other.sites.keys():
            raise ValueError("statistics of different models, steps or bins cannot be merged")
        twice = set(self.layout.videos) & set(other.layout.videos)
        if twice:
            raise ValueError(f"both statistics have seen {min(twice)}")
        layout = replace(self.layout, videos=self.layout.videos + other.layout.videos)
        return Statistics(layout, {name: site.merged(other.sites[name]) for name, site in self.sites.items()})


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Of all videos, in the order of the parts."""
    return reduce(Statistics.merged, parts)


def first_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of a block: the video's stream, where the text has one too."""
    return output[0] if isinstance(output, tuple) else output


class Observer:
    """Collects ``statistics`` while entered: of every linear's input and output, and of the residual stream behind
    every block; without ``layout.full`` the largest magnitudes of inputs and of the stream only.

    Forward hooks only: the computation is not changed. ``where`` tells to which video, step and branch a pass belongs.
    """

    def __init__(self, module: nn.Module, layout: Layout, where: Callable[[], Place], blocks: str = "blocks") -> None:
        self.statistics = Statistics(layout)
        self._module, self._blocks, self._where = module, blocks, where
        self._hooks = ExitStack()
        self._timestep = math.nan
        self._measured: MutableMapping[torch.Tensor, tuple[int, Observed]] = WeakTensorKeyDictionary()

    def __enter__(self) -> Observer:
        enter = self._hooks.enter_context
        for part in getattr(self._module, "parts", (self._module,)):
            if takes_timestep(part):
                begin = partial(self._begin, place_of_timestep(part))
                enter(part.register_forward_pre_hook(begin, with_kwargs=True))
        for name, child in self._module.named_modules():
            if isinstance(child, nn.Linear):
                enter(child.register_forward_pre_hook(partial(self._before, f"{name}:{INPUT}")))
                if self.statistics.layout.full:
                    enter(child.register_forward_hook(partial(self._after, f"{name}:{OUTPUT}")))
        for index, block in enumerate(self._module.get_submodule(self._blocks).children()):
            enter(block.register_forward_hook(partial(self._after, f"{self._blocks}.{index}:{RESIDUAL}")))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _begin(self, place: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep = float(timestep_in(place, args, kwargs))

    def _before(self, site: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._see(site, inputs[0], is_input=True)

    def _after(self, site: str, _: nn.Module, inputs: Any, output: Any) -> None:
        self._see(site, first_of(output), is_input=False)

    def _see(self, name: str, tensor: torch.Tensor, is_input: bool) -> None:
        rows = tensor.detach().view(-1, tensor.shape[-1]) if tensor.is_contiguous() else tensor.detach().flatten(0, -2)
        layout, place, sites = self.statistics.layout, self._where(), self.statistics.sites
        if name not in sites:
            sites[name] = Site.empty(layout, rows.shape[1], with_square=is_input)
        sites[name].timesteps[place[1]] = self._timestep
        if not layout.full:
            sites[name].note(place, float(absmax_rows(rows).amax()), len(rows))
            return
        seen = self._measure(tensor, rows) if is_input else observe_rows(rows, rules=False)
        sites[name].add(place, layout.bin_of(place[1]), seen, len(rows))

    def _measure(self, tensor: torch.Tensor, rows: torch.Tensor) -> Observed:
        """Inputs are what is rounded, so the dynamic rules are tried on them. Several linears share one (Q, K and V of
        a block; K and V of all blocks the text), and it is measured once."""
        known = self._measured.get(tensor)
        if known is None or known[0] != tensor._version:
            known = self._measured[tensor] = tensor._version, observe_rows(rows)
        return known[1]


def save_statistics(statistics: Statistics, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Writes both files into ``folder``, which exists; ``about`` goes into the JSON as it is."""
    arrays, first = {}, {}
    for name, site in statistics.sites.items():
        found = {part.name: getattr(site, part.name) for part in fields(Site)}
        found["counts"], first[name] = _trimmed(site.counts)
        arrays.update({f"{name}/{part}": np.ascontiguousarray(array) for part, array in found.items()})
    save_file(arrays, folder / ARRAYS)
    layout, coverage = asdict(statistics.layout), statistics.coverage()
    description = {**KIND, "layout": layout, "coverage": coverage, "first_bin": first, "about": about or {}}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def load_statistics(folder: Path) -> Statistics:
    """What ``save_statistics`` wrote, bit for bit; ``ValueError`` for files of another version or damaged ones."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        for key, value in KIND.items():
            if described[key] != value:
                raise ValueError(f"{key} {described[key]}, this program reads {value}")
        arrays = load_file(folder / ARRAYS)
        layout = Layout(**{**described["layout"], "videos": tuple(described["layout"]["videos"])})
        sites = {}
        for name, first in described["first_bin"].items():
            found = {part.name: arrays[f"{name}/{part.name}"] for part in fields(Site)}
            found["counts"] = _widened(found["counts"], first)
            sites[name] = Site(**found)
    except Exception as error:  # safetensors, json, a missing key: whatever is wrong, they cannot be used
        raise ValueError(f"cannot read the statistics in {folder}: {error}") from error
    return Statistics(layout, sites)


def _trimmed(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Without the empty bins at the ends, as the smallest unsigned integers that hold it; and its first bin's place."""
    used = np.flatnonzero(counts.sum((0, 1)))
    if not len(used):
        return counts[..., :0].astype(np.uint8), 0
    part = counts[..., used[0] : used[-1] + 1]
    return part.astype(np.min_scalar_type(part.max())), int(used[0])


def _widened(part: np.ndarray, first: int) -> np.ndarray:
    counts = np.zeros((*part.shape[:2], BINS), np.int64)
    counts[..., first : first + part.shape[2]] = part
    return counts
