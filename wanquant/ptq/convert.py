"""``mode=convert``: a pipeline quantized from files to files, without ever being loaded, whatever its size.

Weights are read once and written once, a few blocks at a time (``wanquant.wan.stream``), and what else belongs to the
pipeline is copied. Nothing is generated, so nothing is said about quality: load what it makes, and measure that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wanquant.kernels import check_native
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.plan import SourceModel, resolve_model
from wanquant.quant import ConversionReport, QuantLinear, plan_conversion
from wanquant.quant.scheme import Scheme, parse
from wanquant.quant.select import resolve_blocks
from wanquant.quant.statistics import INPUT, Site
from wanquant.quant.statistics_file import DESCRIPTION, load_statistics
from wanquant.runs.cache import locked
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.finished import in_use
from wanquant.runs.progress import progress
from wanquant.runs.reports.report import summary, write_report
from wanquant.runs.run import Run, digest, read_result, refused_leave_no_result
from wanquant.runs.signature import provenance
from wanquant.runs.tracking import mirror
from wanquant.wan.checkpoint import TRANSFORMERS, read_json
from wanquant.wan.device import forget_peak_memory, give_back_freed_memory, peak_memory
from wanquant.wan.estimate import LEGEND, block_map, in_bytes
from wanquant.wan.load import (
    Transformer,
    check_folder,
    check_weights,
    find_folder,
    hush_libraries,
    shape_of,
    transformers_of,
)
from wanquant.wan.stream import Needs, Recipe, Streamed, convert_transformer, foresee
from wanquant.wan.tensor_files import Source

CPU = torch.device("cpu")


def run_convert(config: PTQConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """As ``run_ptq``."""
    with refused_leave_no_result(folder) if not config.dry_run else nullcontext():
        # One byte a weight in memory too: who converts from files to files has none to spare.
        scheme = parse(dataclasses.replace(config.quant, packed=True))
        config = dataclasses.replace(config, quant=scheme.config)
        model = resolve_model(config, scheme, find_folder(config.model.path, shapes_only=True))
        check_convert(config)
        recipes = recipes_of(config, scheme, model)  # refused before anything is fetched
        torch.set_num_threads(config.threads)
        source = model.folder if config.dry_run else find_folder(config.model.path)
        if not config.dry_run:
            check_whole(source)
        conversion = Conversion(config, scheme, source, recipes)
    print(f"{config.quant.name} on {config.model.name}, protect {config.protect.name}: from files to files", flush=True)
    if config.dry_run:
        print_convert_plan(conversion, config_yaml)
        return None
    hush_libraries()
    with in_use(Path(config.cache), folder):
        result, fresh = _finished(conversion, folder, config_yaml)
    if fresh:
        mirror(config.tracker, folder, dataclasses.asdict(config), result)
    return result


def check_convert(config: PTQConfig) -> None:
    """``ValueError`` for what makes no sense without generating."""
    if config.model.outliers.blocks or config.model.outliers.count:
        raise ValueError("mode=convert takes a model as its files have it: leave model.outliers out")
    if config.eval.dimensions:
        raise ValueError("mode=convert makes no videos to judge: leave eval.dimensions out")
    if config.quant.product == "native":
        check_native(CPU)
    if not config.checkpoint:
        raise ValueError("mode=convert makes a checkpoint and nothing else: leave checkpoint=true")


def check_whole(model: Path) -> None:
    """A pipeline, or a transformer alone."""
    if (model / "model_index.json").is_file():
        check_folder(model)
    else:
        check_weights(model)


def recipes_of(config: PTQConfig, scheme: Scheme, model: SourceModel) -> dict[str, Recipe]:
    """Of each transformer, by its own blocks."""
    if model.protected is None:
        raise ValueError(
            f"mode=convert cannot know the blocks that protect.by={config.protect.by} would choose: let mode=analyze "
            f"choose them, and give protect.blocks=[...]"
        )
    names, stats = list(transformers_of(model.folder)), _statistics(config, scheme)
    each = model.blocks // len(names)
    chosen = resolve_blocks(model.protected, model.blocks)
    recipes = {}
    for number, name in enumerate(names):
        own = range(number * each, (number + 1) * each)
        kept = [index - own.start for index in chosen if index in own]
        # Of a transformer that is protected as a whole no attention is left to quantize, and that is no mistake.
        quant = dataclasses.replace(config.quant, attention="off") if len(kept) == each else config.quant
        recipes[name] = Recipe(quant, kept, config.protect.modules, stats and _of_blocks(stats, own))
    return recipes


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
    found = load_statistics(folder if (folder / DESCRIPTION).is_file() else folder / "analysis")
    return {name.removesuffix(f":{INPUT}"): site for name, site in found.sites.items() if name.endswith(f":{INPUT}")}


@dataclass(frozen=True)
class Conversion:
    """What is to be done: to each transformer of the ``model`` what its recipe says."""

    config: PTQConfig
    scheme: Scheme
    model: Path
    recipes: Mapping[str, Recipe]

    @cached_property
    def parts(self) -> dict[str, Path]:
        return transformers_of(self.model)

    @cached_property
    def shapes(self) -> dict[str, Transformer]:
        return {name: shape_of(part) for name, part in self.parts.items()}

    @cached_property
    def plans(self) -> dict[str, ConversionReport]:
        return {
            name: plan_conversion(self.shapes[name], recipe.config, recipe.protected_blocks, recipe.protected_modules)
            for name, recipe in self.recipes.items()
        }

    @cached_property
    def needs(self) -> dict[str, Needs]:
        return {name: foresee(part, self.recipes[name]) for name, part in self.parts.items()}

    @cached_property
    def signature(self) -> str:
        """By the names, sizes and times of the files: to read them for it would be to read them twice."""
        files = {name: Source.of(part).identity() for name, part in self.parts.items()}
        asked = {name: _signed(recipe) for name, recipe in self.recipes.items()}
        return digest({"folder": str(self.model.resolve()), "files": files, "asked": asked})


def _signed(recipe: Recipe) -> dict[str, Any]:
    """All of it that changes what is written."""
    told = {**dataclasses.asdict(dataclasses.replace(recipe, stats=None))}
    told["config"].pop("name")
    told["stats"] = recipe.stats and {
        name: seen if isinstance(seen, float) else [seen.largest(), seen.mean_square().tolist()]
        for name, seen in recipe.stats.items()
    }
    return told


def print_convert_plan(conversion: Conversion, config_yaml: str) -> None:
    print(config_yaml)
    for name, plan in conversion.plans.items():
        print(f"{name or 'blocks':<14}{block_map(plan)}   ({LEGEND})")
    for name, needs in conversion.needs.items():
        told = f"{in_bytes(needs.written)} written to {needs.files} files, {needs.written / needs.read:.3f} of it"
        print(f"{name:<14}{in_bytes(needs.read)} read, {told}")
    print(
        f"memory        {in_bytes(max(needs.memory for needs in conversion.needs.values()))} beside the program's own"
    )
    print(f"time          {probed_seconds(conversion):,.0f} s, by a probe of CPU and disk")


def probed_seconds(conversion: Conversion) -> float:
    """For quantizing, by one linear of random weights; for reading and writing, by as much to the disk of the cache."""
    part, recipe = next(iter(conversion.recipes.items()))
    blocks, disk = conversion.shapes[part].blocks, Path(conversion.config.cache)
    name, shape = next((name, child) for name, child in blocks.named_modules() if isinstance(child, torch.nn.Linear))
    assert isinstance(shape, torch.nn.Linear)
    linear = torch.nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16)
    scheme, seen = conversion.scheme, (recipe.stats or {}).get(f"blocks.{name}")
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
    moved = sum(needs.read + needs.written for needs in conversion.needs.values())
    return quantizing * sum(needs.quantized for needs in conversion.needs.values()) + writing * moved


def _finished(conversion: Conversion, folder: Path, config_yaml: str) -> tuple[dict[str, Any], bool]:
    """The run's result, and whether it was not known already."""
    config, signed = conversion.config, conversion.signature
    target = Path(config.convert.to) if config.convert.to else folder / "checkpoint"
    names = {group: {"name": getattr(config, group).name} for group in ("model", "quant", "protect")}
    if not config.force and target.is_dir() and (folder / "result.json").is_file():
        result = read_result(folder)
        if result["status"] == "ok" and result.get("asked") == signed:
            print(f"finished already: {folder}; force=true runs it again", flush=True)
            return result, False
    note = Path(config.cache) / "converting" / f"{digest(str(target.resolve()))}.json"
    if not config.force and config.convert.to and target.is_dir() and note.is_file():
        told = read_json(note)
        if told["asked"] == signed and (Path(told["run"]) / "result.json").is_file():
            print(f"finished already: {target}, by {told['run']}", flush=True)
            return read_result(Path(told["run"])), False
    if config.convert.to and target.exists():
        raise ValueError(f"convert.to={target} is there already: choose another folder, or remove it")
    run = Run(folder, "ptq", config_yaml, names)
    try:
        result = {**_convert(conversion, run, target), "asked": signed}
        full = run.finish(result, lambda complete: write_report(run.folder, complete))
    except BaseException as error:
        run.fail(error)
        raise
    write_atomic(note, json.dumps({"asked": signed, "run": str(run.folder.resolve())}) + "\n")
    print(summary(full, run.folder))
    return full, True


def _convert(conversion: Conversion, run: Run, target: Path) -> dict[str, Any]:
    """Writes to ``target``, whole or not at all; takes up what was left of the same conversion."""
    config, planned = conversion.config, conversion.needs
    partial = target.with_name(f"{target.name}.partial")
    if not config.convert.to:  # where a later run, which has another directory, finds it
        partial = Path(config.cache) / "converting" / conversion.signature
    give_back_freed_memory()
    seconds = probed_seconds(conversion)
    forget_peak_memory(CPU)
    begun = peak_memory(CPU)
    lock = Path(config.cache) / "converting" / f"{digest(str(partial.resolve()))}.lock"
    with locked(lock, str(target)):
        partial.mkdir(parents=True, exist_ok=True)
        with run.stage("convert"):
            streamed = {name: _stream(conversion, name, partial) for name in planned}
        peak = peak_memory(CPU)
        with run.stage("copy"):
            copied = _copy(conversion.model, partial)
        shutil.move(partial, target)
    return {
        **_head(conversion),
        **_counts(streamed),
        "memory": {
            "peak_bytes": peak,
            "begun_bytes": begun,
            "planned_bytes": begun + max(needs.memory for needs in planned.values()),
        },
        "convert": {
            "checkpoint": str(target),
            "read_bytes": sum(part.read for part in streamed.values()),
            "written_bytes": sum(part.written for part in streamed.values()),
            "planned_bytes": sum(needs.written for needs in planned.values()),
            "planned_seconds": seconds,
            "copied_bytes": copied,
            "files": {name: needs.files for name, needs in planned.items()},
        },
        "provenance": {**provenance(CPU), "fingerprint": "by names, sizes and times of the files"},
    }


def _stream(conversion: Conversion, name: str, partial: Path) -> Streamed:
    begun, read = time.monotonic(), 0
    with progress(f"convert {name}".rstrip(), conversion.needs[name].parts, "block") as tick:

        def on_block(size: int) -> None:
            nonlocal read
            read += size
            tick(f"{in_bytes(read / max(time.monotonic() - begun, 1e-3))}/s read")

        how = (conversion.recipes[name], conversion.signature, on_block)
        return convert_transformer(conversion.parts[name], partial / name, *how)


def _copy(model: Path, partial: Path) -> int:
    """All of the pipeline that is not quantized; bytes."""
    if not (model / "model_index.json").is_file():
        return 0
    files = [
        path
        for path in sorted(model.rglob("*"))
        if path.is_file() and path.relative_to(model).parts[0] not in TRANSFORMERS
    ]
    with progress("copy", len(files), "file") as tick:
        for path in files:
            there = partial / path.relative_to(model)
            if not there.is_file():
                with replacing(there) as temporary:
                    shutil.copyfile(path, temporary)
            tick()
    return sum(path.stat().st_size for path in files)


def _head(conversion: Conversion) -> dict[str, Any]:
    config, protected, first = conversion.config, list[int](), 0
    for plan in conversion.plans.values():
        protected += [first + index for index in plan.protected_blocks]
        first += plan.blocks
    return {
        "signature": conversion.signature,
        "mode": config.mode,
        "model": {
            "name": config.model.name,
            "blocks": first,
            "parameters": sum(p.numel() for shape in conversion.shapes.values() for p in shape.parameters()),
            "fingerprint": None,
        },
        "quant": dataclasses.asdict(config.quant),
        "protect": {
            "name": config.protect.name,
            "blocks": protected,
            "modules": list(config.protect.modules),
        },
        "generation": dataclasses.asdict(config.model.generation),
    }


def _counts(streamed: Mapping[str, Streamed]) -> dict[str, Any]:
    counts = [part.report.counts() for part in streamed.values()]
    overflowed = {name: count for part in streamed.values() for name, count in sorted(part.overflowed.items())}
    return {
        "conversion": {status: sum(each[status] for each in counts) for status in counts[0]},
        "overflow": {"elements": sum(overflowed.values()), "modules": overflowed},
    }
