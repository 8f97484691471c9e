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
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanquant.quant import ConversionReport, QuantConfig, plan_conversion, quantize_
from wanquant.quant.scheme import parse
from wanquant.quant.statistics import Site
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.run import digest
from wanquant.wan.checkpoints.checkpoint import (
    INDEX,
    WEIGHTS,
    check_keys,
    kept_in_fp32,
    quantized_linears,
    read_json,
    stored_tensors,
    write_config,
)
from wanquant.wan.checkpoints.tensor_files import Source, file_names, write_tensors
from wanquant.wan.load import FOLDS, shape_of

#: Bytes that a file of the target holds at most, unless a block alone has more.
SHARD = 500_000_000
#: In the folder while it is converted: for which recipe, and what of each finished file is to be known.
LEDGER = "converting.json"


@dataclass
class Streamed:
    """What became of the linears, bytes read and written, and weights beyond the format's range by linear."""

    report: ConversionReport
    read: int = 0
    written: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """As the arguments of ``quantize_``."""

    config: QuantConfig
    protected_blocks: Sequence[int] = ()
    protected_modules: Sequence[str] = ()
    stats: Mapping[str, float | Site] | None = None


def convert_transformer(
    source: Path, target: Path, recipe: Recipe, signed: str, on_block: Callable[[int], None] = lambda size: None
) -> Streamed:
    """Reads the transformer in ``source`` and writes it, quantized, to ``target``, taking up what an earlier call with
    the same ``signed`` left there. ``on_block`` is told the bytes read of each block, also of those that are done.

    ``ValueError`` for what ``quantize_`` refuses, and for tensors that are missing or unknown."""
    tensors, transformer = Source.of(source), empty_like(source)
    check_keys(transformer.state_dict(), tensors.tensors, source)
    plan = plan_conversion(transformer, recipe.config, recipe.protected_blocks, recipe.protected_modules)
    target.mkdir(parents=True, exist_ok=True)
    ledger = _Ledger.open(target / LEDGER, [signed, tensors.identity()])
    groups = grouped(stored_sizes(transformer, recipe, plan))
    names = file_names(len(groups))
    streamed, weight_map = Streamed(plan), dict[str, str]()
    parts = [part for group in groups for part in group]
    after = dict(itertools.pairwise(parts))
    for name, group in zip(names, groups, strict=True):
        if name not in ledger.files:
            with replacing(target / name) as temporary:
                told = _convert(transformer, tensors, group, after, recipe, plan, temporary, on_block)
            ledger.note(name, told)
        else:
            for size in ledger.files[name]["read"]:
                on_block(size)
        told = ledger.files[name]
        streamed.read += sum(told["read"])
        streamed.written += told["written"]
        streamed.overflowed |= told["overflowed"]
        weight_map |= dict.fromkeys(told["tensors"], name)
    if len(names) > 1:
        index = {"metadata": {"total_size": streamed.written}, "weight_map": weight_map}
        write_atomic(target / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    if plan.names("converted"):
        write_config(transformer, parse(recipe.config).config, plan.names("converted"), target)
    else:  # only another naming, and other files
        transformer.save_config(target)
    (target / LEDGER).unlink()
    return streamed


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


def foresee(source: Path, recipe: Recipe) -> Needs:
    """Works without the weights, which are then taken to be in BF16."""
    transformer = empty_like(source)
    plan = plan_conversion(transformer, recipe.config, recipe.protected_blocks, recipe.protected_modules)
    there = (source / INDEX).is_file() or (source / WEIGHTS).is_file()
    known = Source.of(source).tensors if there else {}
    sizes = {n: known[n].size if there else 2 * t.numel() for n, t in transformer.state_dict().items()}
    parts = stored_sizes(transformer, recipe, plan)
    groups = grouped(parts)
    memory = 0
    for group in groups:
        held = 0
        for part in group:
            loaded = sum(2 * t.numel() for t in transformer.blocks[part].parameters()) if part is not None else 0
            memory = max(memory, held + loaded + max(sizes.values()))
            held += parts[part]
    quantized = sum(transformer.get_submodule(name).weight.numel() for name in plan.names("converted"))
    return Needs(sum(sizes.values()), sum(parts.values()), quantized, len(groups), len(parts), memory)


def empty_like(source: Path) -> WanTransformer3DModel:
    """On the meta device."""
    transformer = shape_of(source)
    transformer.register_to_config(_name_or_path=str(source))  # as from_pretrained notes where it comes from
    transformer.requires_grad_(False)
    return transformer


def stored_sizes(transformer: WanTransformer3DModel, recipe: Recipe, plan: ConversionReport) -> dict[int | None, int]:
    """Bytes of each block as it is stored, and under None of all that is outside of them."""
    converted, granularity = plan.names("converted"), parse(recipe.config).weight_granularity
    coded = {f"{name}.weight" for name in converted}
    found: dict[int | None, int] = dict.fromkeys([None, *range(plan.blocks)], 0)
    for name, tensor in transformer.state_dict().items():
        each = 1 if name in coded else 4 if kept_in_fp32(transformer, name) else 2
        found[_part_of(name)] += each * tensor.numel()
    for name in converted:
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found[_part_of(name)] += 4 * math.prod(granularity.scale_shape(linear.out_features, linear.in_features))
    return found


def _part_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def grouped(sizes: Mapping[int | None, int]) -> list[list[int | None]]:
    """Which blocks lie in a file together."""
    groups: list[list[int | None]] = [[]]
    filled = 0
    for part, size in sizes.items():
        if groups[-1] and filled + size > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    return groups


@dataclass
class _Ledger:
    path: Path
    recipe: str
    files: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, recipe: list[Any]) -> _Ledger:
        """Forgets what another recipe has left."""
        signed = digest(recipe)
        known = read_json(path) if path.is_file() else {}
        if known.get("recipe") != signed:
            for old in path.parent.iterdir():
                old.unlink()
            known = {"files": {}}
        ledger = cls(path, signed, known["files"])
        ledger._write()
        return ledger

    def note(self, name: str, told: dict[str, Any]) -> None:
        self.files[name] = told
        self._write()

    def _write(self) -> None:
        write_atomic(self.path, json.dumps({"recipe": self.recipe, "files": self.files}) + "\n")


def _convert(
    transformer: WanTransformer3DModel,
    tensors: Source,
    group: Sequence[int | None],
    after: Mapping[int | None, int | None],
    recipe: Recipe,
    plan: ConversionReport,
    path: Path,
    on_block: Callable[[int], None],
) -> dict[str, Any]:
    """Writes one file; what the ledger keeps of it. What comes ``after`` a part is fetched while that is quantized."""
    touched = {row.block for row in plan.modules if row.status == "converted"}
    stored: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {"read": [], "overflowed": {}}
    for index in group:
        prefix, names = _prefix(index), _names_of(tensors, index)
        kinds = {n: torch.float32 if kept_in_fp32(transformer, n) else torch.bfloat16 for n in names}
        size = sum(tensors.tensors[name].size for name in names)
        read = tensors.read(kinds)
        if index in after:
            tensors.expect(_names_of(tensors, after[index]))
        if index is None or index not in touched:
            stored |= read
        else:
            block = transformer.blocks[index]
            block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in read.items()}, assign=True)
            del read
            told["overflowed"] |= _quantize(block, index, recipe)
            stored |= stored_tensors(block, lambda name: kept_in_fp32(transformer, name), prefix)
            transformer.blocks[index] = nn.Identity()  # what it held has gone into ``stored``
        told["read"].append(size)
        on_block(size)
    told["written"] = write_tensors(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}, stored.__getitem__, path
    )
    told["tensors"] = sorted(stored)
    return told


def _prefix(part: int | None) -> str:
    return "" if part is None else f"blocks.{part}."


def _names_of(tensors: Source, part: int | None) -> list[str]:
    """Of a block, or of what is outside of all."""
    prefix = _prefix(part)
    return [n for n in tensors.tensors if (n.startswith(prefix) if prefix else not n.startswith("blocks."))]


def _quantize(block: nn.Module, index: int, recipe: Recipe) -> dict[str, int]:
    """In place, its weights as codes; how many of each linear were beyond the range."""
    holder, own = nn.Module(), f"blocks.{index}."
    holder.blocks = nn.ModuleList([block])
    stats = {
        name.replace(own, "blocks.0.", 1): seen for name, seen in (recipe.stats or {}).items() if name.startswith(own)
    }
    packed = replace(recipe.config, packed=True)
    quantize_(holder, packed, (), recipe.protected_modules, stats, folds=FOLDS)
    layers = quantized_linears(block)
    return {own + name: int(layer.overflowed) for name, layer in layers.items() if layer.overflowed}
