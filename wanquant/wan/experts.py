"""The transformers of a pipeline as one module with one list of ``blocks``: its only one as it is, if it has them so,
else a view of it, or of both of Wan2.2.

Wan2.2's pipelines denoise with two transformers of one shape, the first while the noise is high, the second from a
timestep on that the pipeline names (``boundary_ratio``). Other families have their blocks in lists of other names.
Blocks are numbered through here, so that whoever looks at, protects, quantizes or trains blocks needs not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from wanquant.wan.checkpoints.checkpoint import TRANSFORMERS, read_json
from wanquant.wan.checkpoints.find import shape_of
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.families import family_of

#: Of training, in which a timestep is a number between 0 and this.
TIMESTEPS = 1000


class _Through(nn.ModuleList):
    """The blocks of several lists; what takes the place of one takes it in its own list too."""

    def __init__(self, lists: Sequence[nn.ModuleList]) -> None:
        super().__init__(block for each in lists for block in each)
        self._places = [(each, index) for each in lists for index in range(len(each))]

    def __setitem__(self, place: int, block: nn.Module) -> None:  # type: ignore[override]
        super().__setitem__(place, block)
        own, index = self._places[place]
        own[index] = block


class Whole(nn.Module):
    """``parts`` stay what they are: their blocks are this module's ``blocks``, one list after the other, and what else
    is in the first and only, or the first of two, is here under its own name; of the second below ``transformer_2``."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        lists = [family_of(type(part).__name__).block_lists for part in parts]
        self.blocks = _Through([getattr(part, n) for part, own in zip(parts, lists, strict=True) for n in own])
        holders = [self, nn.Module()]
        if len(parts) > 1:
            self.transformer_2 = holders[1]
        for holder, part, own in zip(holders, parts, lists, strict=False):
            for name, child in part.named_children():
                if name not in own:
                    holder.add_module(name, child)
            for name, parameter in part.named_parameters(recurse=False):
                holder.register_parameter(name, parameter)

    @property
    def config(self) -> Any:
        return FrozenDict({**self.parts[0].config, "num_layers": len(self.blocks)})

    def enable_gradient_checkpointing(self) -> None:
        for part in self.parts:
            part.enable_gradient_checkpointing()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.parts[0](*args, **kwargs)


class Experts(Whole):
    """Both of Wan2.2. Asked for the velocity of several rows, each is answered by the part for its timestep."""

    def __init__(self, parts: Sequence[WanTransformer3DModel], boundary: float) -> None:
        first, second = parts
        if len(first.blocks) != len(second.blocks):
            raise ValueError(f"two transformers of {len(first.blocks)} and {len(second.blocks)} blocks: no Wan2.2")
        super().__init__(parts)
        self.boundary = boundary

    def part_of(self, timesteps: torch.Tensor) -> torch.Tensor:
        """0 or 1 for each."""
        return (timesteps < self.boundary).long()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        text, further = (args[0], args[1:]) if args else (kwargs.pop("encoder_hidden_states"), ())
        return_dict = kwargs.pop("return_dict", True)
        chosen, found = self.part_of(timestep), torch.empty(0)
        for number, part in enumerate(self.parts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                given = (hidden_states[rows], timestep[rows], text[rows], *further)
                output = part(*given, **kwargs, return_dict=False)[0]
                found = found if len(found) else output.new_zeros((len(chosen), *output.shape[1:]))
                found = found.index_copy(0, rows, output)
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)


def as_whole(part: Any) -> Any:
    """One transformer with its blocks in one list: itself, if that is how it has them."""
    return part if set(family_of(type(part).__name__).block_lists) == {"blocks"} else Whole([part])


def transformers_in(pipe: WanPipeline) -> dict[str, WanTransformer3DModel]:
    """By the names the pipeline has for them."""
    return {name: getattr(pipe, name) for name in TRANSFORMERS if getattr(pipe, name, None) is not None}


def whole_of(pipe: WanPipeline) -> Any:
    """The pipeline's transformer as one module."""
    parts = list(transformers_in(pipe).values())
    return as_whole(parts[0]) if len(parts) == 1 else Experts(parts, pipe.config.boundary_ratio * TIMESTEPS)


def parts_of(whole: nn.Module) -> tuple[nn.Module, ...]:
    return whole.parts if isinstance(whole, Whole) else (whole,)


def put(pipe: WanPipeline, whole: nn.Module) -> None:
    """In the place of the pipeline's."""
    for name, part in zip(transformers_in(pipe), parts_of(whole), strict=True):
        setattr(pipe, name, part)


def shape_of_whole(model: Path | ModelFiles) -> Any:
    """As ``whole_of``, on the meta device, of a pipeline or of a transformer alone. Not to be changed: it is kept for
    who asks again."""
    files = ModelFiles.of(model)
    parts = tuple(files.transformers.values())
    described = [files.folder / "model_index.json", *(part.path / "config.json" for part in parts)]
    stamps = [part.stamps() for part in parts if not part.as_diffusers]
    known = tuple(path.read_bytes() if path.is_file() else b"" for path in described)
    return _shape(files.folder, parts, (*known, repr(stamps).encode()))


@lru_cache(maxsize=8)
def _shape(folder: Path, parts: tuple[Source, ...], described: tuple[bytes, ...]) -> Any:
    shapes = [shape_of(part) for part in parts]
    if len(shapes) == 1:
        return as_whole(shapes[0])
    ratio = read_json(folder / "model_index.json").get("boundary_ratio")
    if not isinstance(ratio, int | float):
        raise ValueError(f"{folder} has two transformers, and its model_index.json no boundary_ratio between them")
    return Experts(shapes, ratio * TIMESTEPS)
