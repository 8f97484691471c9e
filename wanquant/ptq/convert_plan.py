"""``mode=convert``, resolved: which transformer is quantized how, and what that needs of memory, disk and time."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanquant.ptq.config import PTQConfig
from wanquant.ptq.plan import resolve_model
from wanquant.quant import ConversionReport, QuantLinear
from wanquant.quant.eight_bit import check_product
from wanquant.quant.scheme import Scheme, parse
from wanquant.quant.select import resolve_blocks
from wanquant.quant.statistics import DESCRIPTION, INPUT, Site, load_statistics
from wanquant.runs.progress import progress
from wanquant.runs.run import digest
from wanquant.wan.checkpoints.checkpoint import read_json
from wanquant.wan.checkpoints.find import check_folder, check_weights, find_model, shape_of
from wanquant.wan.checkpoints.model_files import ModelFiles, count_files, fingerprint
from wanquant.wan.checkpoints.stream import Needs, Recipe, foresee
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.experts import as_whole
from wanquant.wan.load import Transformer
from wanquant.wan.resources.printed import LEGEND, block_map, in_bytes, in_time, rounding

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """One transformer of the pipeline: its files, and how it is quantized."""

    source: Source
    recipe: Recipe

    @cached_property
    def shape(self) -> Transformer:
        return shape_of(self.source)

    @cached_property
    def report(self) -> ConversionReport:
        return self.recipe.plan(self.shape)

    @cached_property
    def needs(self) -> Needs:
        return foresee(self.source, self.recipe)


@dataclass(frozen=True)
class ConvertPlan:
    """``parts`` by their names in the pipeline; under an empty name a transformer that is no part of one.
    ``fingerprint`` is that of the files, once they are there."""

    config: PTQConfig
    scheme: Scheme
    files: ModelFiles
    parts: Mapping[str, Part]
    fingerprint: str = ""

    @cached_property
    def signature(self) -> str:
        """By what is in the files, and not by where they are or when they were written."""
        asked = {name: _signed(part.recipe) for name, part in self.parts.items()}
        told = self.files.folder / "generation.json"
        generation = read_json(told) if told.is_file() else None
        return digest({"files": self.fingerprint, "generation": generation, "asked": asked})

    @property
    def working(self) -> Path:
        """Where unfinished conversions, and notes of the finished ones, are kept."""
        return Path(self.config.cache) / "converting"

    @property
    def needs(self) -> list[Needs]:
        return [part.needs for part in self.parts.values()]


def resolve_convert(config: PTQConfig) -> ConvertPlan:
    """From the JSON files of the model. ``ValueError`` names the key at fault and what it may be."""
    config.check()
    # One byte a weight in memory too: who converts from files to files has none to spare.
    scheme = parse(dataclasses.replace(config.quant, packed=True))
    if scheme.feedback:
        raise ValueError(
            "quant.weights.feedback=true needs more of calibration than an analysis keeps: use mode=quantize"
        )
    config = dataclasses.replace(config, quant=scheme.config)
    files = find_model(config.model.path, config.model.base, shapes_only=True, alone=True)
    model = resolve_model(config, scheme, files)
    check_product(scheme, CPU)
    if model.protected is None:
        raise ValueError(
            f"mode=convert cannot know the blocks that protect.by={config.protect.by} would choose: let mode=analyze "
            "choose them, and give protect.blocks=[...] protect.through=true"
        )
    stats, each = _statistics(config, scheme), model.blocks // model.transformers
    chosen = resolve_blocks(model.protected, model.blocks)
    parts = {}
    for number, (name, source) in enumerate(files.transformers.items()):
        own = range(number * each, (number + 1) * each)
        kept = [index - own.start for index in chosen if index in own]
        # Of a transformer that is protected as a whole no attention is left to quantize, and that is no mistake.
        quant = dataclasses.replace(config.quant, attention="off") if len(kept) == each else config.quant
        recipe = Recipe(quant, kept, config.protect.modules, stats and _of_blocks(stats, own))
        parts[name] = Part(source, recipe)
    return ConvertPlan(config, scheme, files, parts)


def with_files(plan: ConvertPlan) -> ConvertPlan:
    """The same of the files with the weights, which are fetched if they are on the hub, and whole."""
    files = find_model(plan.config.model.path, plan.config.model.base, alone=True)
    if files.is_pipeline:
        check_folder(files)
    for source in files.transformers.values():
        if not source.is_file:
            check_weights(source.path)
    with progress("read", count_files(files), "file") as tick:
        found = fingerprint(files, tick, verify=plan.config.verify)
    parts = {name: Part(files.transformers[name], part.recipe) for name, part in plan.parts.items()}
    return dataclasses.replace(plan, files=files, parts=parts, fingerprint=found)


def _of_blocks(stats: Mapping[str, float | Site], own: range) -> dict[str, float | Site]:
    """Those of one transformer, its blocks numbered from 0."""
    found = {}
    for name, seen in stats.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) in own:
            found[".".join(["blocks", str(int(parts[1]) - own.start), *parts[2:]])] = seen
    return found


def _statistics(config: PTQConfig, scheme: Scheme) -> Mapping[str, float | Site] | None:
    """Of the linears' inputs, from a run of ``mode=analyze``."""
    if not config.convert.statistics:
        if scheme.needs_statistics or scheme.act_static:
            raise ValueError(
                f"{config.quant.name} needs calibration statistics: run mode=analyze, and give its directory as "
                f"convert.statistics"
            )
        return None
    folder = Path(config.convert.statistics)
    folder = folder if (folder / DESCRIPTION).is_file() else folder / "analysis"
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"convert.statistics={config.convert.statistics}: not the directory of a run with mode=analyze"
        )
    found = load_statistics(folder)
    if found.layout.steps < scheme.act_steps:
        has = f"{folder} has statistics of {found.layout.steps} denoising steps"
        raise ValueError(f"quant.activations.steps={scheme.act_steps}: {has}, analyze with as many or more")
    return {name.removesuffix(f":{INPUT}"): site for name, site in found.sites.items() if name.endswith(f":{INPUT}")}


def _signed(recipe: Recipe) -> dict[str, Any]:
    """All of it that changes what is written."""
    told = dataclasses.asdict(dataclasses.replace(recipe, stats=None))
    told["config"].pop("name")
    told["stats"] = recipe.stats and {
        name: seen
        if isinstance(seen, float)
        else [seen.largest(), seen.mean_square().tolist(), *_by_step(seen, recipe)]
        for name, seen in recipe.stats.items()
    }
    return told


def _by_step(seen: Site, recipe: Recipe) -> list[Any]:
    """What scales by denoising step are found of."""
    return [seen.absmax.max((0, 2)).tolist(), seen.timesteps.tolist()] if recipe.scheme.act_steps > 1 else []


def print_convert_plan(plan: ConvertPlan, config_yaml: str) -> None:
    print(config_yaml)
    print(f"rounding      {rounding(plan.scheme)}")
    for name, part in plan.parts.items():
        print(f"{name or 'blocks':<14}{block_map(part.report)}   ({LEGEND})")
    for name, part in plan.parts.items():
        needs = part.needs
        told = f"{in_bytes(needs.written)} written to {needs.files} files, {needs.written / needs.read:.3f} of it"
        print(f"{name:<14}{in_bytes(needs.read)} read, {told}")
    print(f"memory        {in_bytes(max(needs.memory for needs in plan.needs))} beside the program's own")
    print(f"time          {in_time(probed_seconds(plan))}, by a probe of CPU and disk")


def probed_seconds(plan: ConvertPlan) -> float:
    """For quantizing, by one linear of random weights; for reading and writing, by as much to the disk of the cache."""
    part, disk = next(iter(plan.parts.values())), Path(plan.config.cache)
    blocks = as_whole(part.shape).blocks
    name, shape = next((name, child) for name, child in blocks.named_modules() if isinstance(child, nn.Linear))
    linear = nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16)
    scheme, seen = plan.scheme, (part.recipe.stats or {}).get(f"blocks.{name}")
    quantizing, written = 0.0, linear.weight.detach().view(torch.uint8)
    if not scheme.format.keeps_all:
        QuantLinear.from_linear(linear, scheme, seen)  # for warmth
        begun = time.perf_counter()
        written = QuantLinear.from_linear(linear, scheme, seen).codes()
        quantizing = (time.perf_counter() - begun) / linear.weight.numel()
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=disk) as file:
        begun = time.perf_counter()
        file.write(written.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
        writing = (time.perf_counter() - begun) / written.nbytes
    return sum(quantizing * needs.quantized + writing * (needs.read + needs.written) for needs in plan.needs)
