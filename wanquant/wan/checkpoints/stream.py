"""Quantizes a transformer from files to files, a few blocks at a time, so that a model of any size fits.

What happens to a block is what ``quantize_`` does to it in a whole model, so the tensors are those that loading,
quantizing and saving would write; only the files may be more and smaller ones. Every tensor is read once, whatever the
source's files hold, and each file of the target is written under another name and renamed. A conversion that was killed
goes on behind the last file it had finished.

In memory at once are the blocks of one file of the target, ``SHARD`` bytes or a single block, and the tensor that is
read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanquant.quant import ConversionReport, QuantConfig, plan_conversion, quantize_
from wanquant.quant.conversion import ModuleReport
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.quant.statistics import Site
from wanquant.runs.files import replacing, sum_of_file, write_atomic
from wanquant.wan.checkpoints.checkpoint import (
    kept_in_fp32,
    quantized_linears,
    read_json,
    stored_tensors,
    write_config,
    write_index,
)
from wanquant.wan.checkpoints.find import shape_of
from wanquant.wan.checkpoints.tensor_files import Source, file_names, write_tensors
from wanquant.wan.experts import as_whole
from wanquant.wan.families import block_names, block_of, folds_of

#: Bytes that a file of the target holds at most, unless a block alone has more.
SHARD = 500_000_000
#: In the folder while it is converted: for which recipe, and what of each finished file is to be known.
LEDGER = "converting.json"
#: Index of a block, or None for all that is outside of the blocks.
Part = int | None


@dataclass
class Streamed:
    """What became of the linears, bytes read and written, weights beyond the format's range by linear, and the sums of
    the files."""

    report: ConversionReport
    read: int = 0
    written: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    sums: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """As the arguments of ``quantize_``."""

    config: QuantConfig
    protected_blocks: Sequence[int] = ()
    protected_modules: Sequence[str] = ()
    stats: Mapping[str, float | Site] | None = None

    @cached_property
    def scheme(self) -> Scheme:
        return scheme_of(self.config)

    def plan(self, transformer: nn.Module) -> ConversionReport:
        """What becomes of each linear, by its name in a file; ``ValueError`` for what ``quantize_`` refuses."""
        plan = plan_conversion(as_whole(transformer), self.scheme, self.protected_blocks, self.protected_modules)
        names = block_names(transformer)

        def as_stored(row: ModuleReport) -> ModuleReport:
            within = row.name.removeprefix(f"blocks.{row.block}.")
            return row if row.block is None else replace(row, name=f"{names[row.block]}.{within}")

        return replace(
            plan, modules=tuple(map(as_stored, plan.modules)), attentions=tuple(map(as_stored, plan.attentions))
        )


def convert_transformer(
    where: Path | Source, target: Path, recipe: Recipe, signed: str, on_block: Callable[[int], None] = lambda size: None
) -> Streamed:
    """Reads the transformer at ``where`` and writes it, quantized, to ``target``, taking up what an earlier call with
    the same ``signed`` left there, which says what the source and the recipe are. ``on_block`` is told the bytes read
    of each block, also of those that are done.

    ``ValueError`` for what ``quantize_`` refuses, and for tensors that are missing, unknown or not finite."""
    source = Source.of(where)
    transformer = empty_like(source)
    source.check(transformer)
    plan = recipe.plan(transformer)
    target.mkdir(parents=True, exist_ok=True)
    ledger = _open_ledger(target, signed)
    groups = grouped(stored_sizes(transformer, recipe, plan))
    conversion = _Conversion(transformer, source, recipe, plan, groups)
    streamed, weight_map, names = Streamed(plan), dict[str, str](), file_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        if _is_finished(target / name, ledger["files"].get(name)):
            for size in ledger["files"][name]["read"]:
                on_block(size)
        else:
            with replacing(target / name) as temporary:
                told = conversion.write(group, temporary, on_block)
                ledger["files"][name] = told | {"sha256": sum_of_file(temporary)}
            write_atomic(target / LEDGER, json.dumps(ledger) + "\n")
        told = ledger["files"][name]
        streamed.read += sum(told["read"])
        streamed.written += told["written"]
        streamed.overflowed |= told["overflowed"]
        streamed.sums[target / name] = told["sha256"]
        weight_map |= dict.fromkeys(told["tensors"], name)
    if len(names) > 1:
        write_index(target, streamed.written, weight_map)
    if plan.names("converted"):
        write_config(transformer, recipe.scheme, plan.names("converted"), target)
    else:  # only another naming, and other files
        transformer.save_config(target)
    (target / LEDGER).unlink()
    return streamed


def _is_finished(path: Path, told: dict[str, Any] | None) -> bool:
    """By what is in it: after a power cut a file that was written may not be."""
    return told is not None and path.is_file() and sum_of_file(path) == told["sha256"]


def _open_ledger(target: Path, recipe: str) -> dict[str, Any]:
    """What is known of each finished file; forgets what another recipe has left."""
    path = target / LEDGER
    known = read_json(path) if path.is_file() else {}
    if known.get("recipe") != recipe:
        for old in target.iterdir():
            old.unlink()
        known = {"recipe": recipe, "files": {}}
        write_atomic(path, json.dumps(known) + "\n")
    return known


@dataclass(frozen=True)
class Needs:
    """Bytes read and written, weights quantized, files and parts (blocks, and what is outside of them), and bytes of
    memory besides what the program has: all from the shapes."""

    read: int
    written: int
    quantized: int
    files: int
    parts: int
    memory: int


def foresee(where: Path | Source, recipe: Recipe) -> Needs:
    """Works without the weights, which are then taken to be in BF16."""
    source = Source.of(where)
    transformer = empty_like(source)
    plan = recipe.plan(transformer)
    known = source.tensors if source.is_there else {}
    if known:
        source.check(transformer)
    plain = {name: 2 * tensor.numel() for name, tensor in transformer.state_dict().items()}
    sizes = {name: known[name].size if known else size for name, size in plain.items()}
    largest = max(known[name].held if known else size for name, size in plain.items())
    parts = stored_sizes(transformer, recipe, plan)
    groups, blocks = grouped(parts), block_names(transformer)
    memory = 0
    for group in groups:
        held = 0
        for part in group:
            inside = transformer.get_submodule(blocks[part]).parameters() if part is not None else ()
            loaded = sum(2 * tensor.numel() for tensor in inside)
            memory = max(memory, held + loaded + largest)
            held += parts[part]
    quantized = sum(transformer.get_submodule(name).weight.numel() for name in plan.names("converted"))
    return Needs(sum(sizes.values()), sum(parts.values()), quantized, len(groups), len(parts), memory)


def empty_like(where: Path | Source) -> WanTransformer3DModel:
    """On the meta device."""
    source = Source.of(where)
    transformer = shape_of(source)
    transformer.register_to_config(_name_or_path=str(source.path))  # as from_pretrained notes where it comes from
    transformer.requires_grad_(False)
    return transformer


def stored_sizes(transformer: WanTransformer3DModel, recipe: Recipe, plan: ConversionReport) -> dict[Part, int]:
    """Bytes of each part as it is stored."""
    converted = plan.names("converted")
    coded = {f"{name}.weight" for name in converted}
    found: dict[Part, int] = dict.fromkeys([None, *range(plan.blocks)], 0)
    for name, tensor in transformer.state_dict().items():
        if name not in coded:
            each = 4 if kept_in_fp32(transformer, name) else 2
            found[block_of(name, transformer)] += each * tensor.numel()
    for name in converted:
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found[block_of(name, transformer)] += recipe.scheme.packed_bytes(linear)
    return found


def grouped(sizes: Mapping[Part, int]) -> list[list[Part]]:
    """Which parts lie in a file together."""
    groups: list[list[Part]] = [[]]
    filled = 0
    for part, size in sizes.items():
        if groups[-1] and filled + size > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    return groups


class _Conversion:
    def __init__(
        self,
        transformer: WanTransformer3DModel,
        source: Source,
        recipe: Recipe,
        plan: ConversionReport,
        groups: Sequence[Sequence[Part]],
    ) -> None:
        self.transformer, self.source, self.recipe = transformer, source, recipe
        self.blocks = block_names(transformer)
        self.touched = {row.block for row in plan.modules if row.status == "converted"}
        self.names: dict[Part, list[str]] = {part: [] for group in groups for part in group}
        for name in source.tensors:
            self.names[block_of(name, transformer)].append(name)
        self.after = dict(itertools.pairwise(self.names))

    def write(self, group: Sequence[Part], path: Path, on_block: Callable[[int], None]) -> dict[str, Any]:
        """One file; what the ledger keeps of it. What comes after a part is fetched while that is quantized."""
        stored: dict[str, torch.Tensor] = {}
        told: dict[str, Any] = {"read": [], "overflowed": {}}
        for part in group:
            read = {name: self.source.read_for(self.transformer, name) for name in self.names[part]}
            size = sum(self.source.tensors[name].size for name in read)
            if part in self.after:
                self.source.expect(self.names[self.after[part]])
            if part is None or part not in self.touched:
                stored |= read
            else:
                told["overflowed"] |= self._quantize(part, read)
                name = self.blocks[part]
                stored |= stored_tensors(self.transformer.get_submodule(name), self.transformer, f"{name}.")
                self.transformer.set_submodule(name, nn.Identity())  # what it held has gone into ``stored``
            told["read"].append(size)
            on_block(size)
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
        told["written"] = write_tensors(shapes, stored.__getitem__, path)
        told["tensors"] = sorted(stored)
        return told

    def _quantize(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        """Fills a block, which takes the tensors, and quantizes it, its weights as codes; how many of each linear were
        beyond the range."""
        block, own = self.transformer.get_submodule(self.blocks[index]), f"{self.blocks[index]}."
        block.load_state_dict({name.removeprefix(own): tensors.pop(name) for name in list(tensors)}, assign=True)
        holder = nn.Module()
        holder.blocks = nn.ModuleList([block])
        seen = (self.recipe.stats or {}).items()
        known = f"blocks.{index}."  # statistics have them numbered through
        stats = {name.replace(known, "blocks.0.", 1): site for name, site in seen if name.startswith(known)}
        packed = replace(self.recipe.scheme, packed=True)
        quantize_(holder, packed, (), self.recipe.protected_modules, stats, folds=folds_of(self.transformer))
        layers = quantized_linears(block)
        return {own + name: int(layer.overflowed_weight) for name, layer in layers.items() if layer.overflowed_weight}
