"""``mode=convert``: a pipeline quantized from files to files, without ever being loaded, whatever its size.

Weights are read once and written once, a few blocks at a time (``wanquant.wan.stream``), and what else belongs to the
pipeline is copied. Nothing is generated, so nothing is said about quality: load what it makes, and measure that.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wanquant.kernels import check_native
from wanquant.ptq.config import PTQConfig, check_model, rule_blocks
from wanquant.ptq.plan import LEGEND, block_map, in_bytes
from wanquant.quant import ConversionReport, QuantLinear, plan_conversion
from wanquant.quant.config import parse, settle
from wanquant.quant.statistics import INPUT, Site
from wanquant.quant.statistics_file import DESCRIPTION, load_statistics
from wanquant.runs.cache import locked
from wanquant.runs.files import replacing
from wanquant.runs.finished import in_use
from wanquant.runs.progress import progress
from wanquant.runs.report import summary, write_report
from wanquant.runs.run import Run, digest, provenance, read_result, refused_leave_no_result
from wanquant.runs.tracking import mirror
from wanquant.wan.checkpoint import TRANSFORMERS
from wanquant.wan.device import forget_peak_memory, peak_memory
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
        config = dataclasses.replace(config, quant=dataclasses.replace(settle(config.quant), packed=True))
        check_convert(config)
        torch.set_num_threads(config.threads)
        model = find_folder(config.model.path, shapes_only=config.dry_run)
        if not config.dry_run:
            check_whole(model)
        recipe = recipe_of(config, model)
    print(f"{config.quant.name} on {config.model.name}, protect {config.protect.name}: from files to files", flush=True)
    if config.dry_run:
        print_convert_plan(config, config_yaml, model, recipe)
        return None
    hush_libraries()
    with in_use(Path(config.cache), folder):
        result, fresh = _finished(config, folder, config_yaml, model, recipe)
    if fresh:
        mirror(config.tracker, folder, dataclasses.asdict(config), result)
    return result


def check_convert(config: PTQConfig) -> None:
    """``ValueError`` for what cannot be known without the model, or makes no sense without generating."""
    check_model(config)
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


def recipe_of(config: PTQConfig, model: Path) -> Recipe:
    blocks = rule_blocks(config.protect, len(first_shape(model).blocks))
    if blocks is None:
        raise ValueError(
            f"mode=convert cannot know the blocks that protect.by={config.protect.by} would choose: let mode=analyze "
            f"choose them, and give protect.blocks=[...]"
        )
    return Recipe(config.quant, blocks, config.protect.modules, _statistics(config))


def _statistics(config: PTQConfig) -> Mapping[str, float | Site] | None:
    """Of the linears' inputs, from a run of ``mode=analyze``."""
    scheme = parse(config.quant)
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


def print_convert_plan(config: PTQConfig, config_yaml: str, model: Path, recipe: Recipe) -> None:
    print(config_yaml)
    planned, plan = needs_of(model, recipe), plan_of(model, recipe)
    print(f"blocks      {block_map(plan)}   ({LEGEND})")
    for name, needs in planned.items():
        told = f"{in_bytes(needs.written)} written to {needs.files} files, {needs.written / needs.read:.3f} of it"
        print(f"{name:<12}{in_bytes(needs.read)} read, {told}")
    print(f"memory      {in_bytes(max(needs.memory for needs in planned.values()))} beside the program's own")
    print(
        f"time        {probed_seconds(planned, model, recipe, Path(config.cache)):,.0f} s, by a probe of CPU and disk"
    )


def first_shape(model: Path) -> Transformer:
    """Of the pipeline's transformer, or its first."""
    return shape_of(next(iter(transformers_of(model).values())))


def plan_of(model: Path, recipe: Recipe) -> ConversionReport:
    shape = first_shape(model)
    return plan_conversion(shape, recipe.config, recipe.protected_blocks, recipe.protected_modules)


def needs_of(model: Path, recipe: Recipe) -> dict[str, Needs]:
    return {name: foresee(part, recipe) for name, part in transformers_of(model).items()}


def probed_seconds(planned: Mapping[str, Needs], model: Path, recipe: Recipe, disk: Path) -> float:
    """For quantizing, by one linear of random weights, and for writing, by as much to the disk of the cache."""
    name = next(name for name, child in first_shape(model).blocks.named_modules() if isinstance(child, torch.nn.Linear))
    shape = first_shape(model).blocks.get_submodule(name)
    assert isinstance(shape, torch.nn.Linear)
    linear = torch.nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16)
    scheme, seen = parse(dataclasses.replace(recipe.config, packed=True)), (recipe.stats or {}).get(f"blocks.{name}")
    quantizing, written = 0.0, linear.weight.detach().view(torch.uint8)
    if not scheme.format.keeps_all:
        QuantLinear.from_linear(linear, scheme, seen)  # for warmth
        begun = time.perf_counter()
        written = QuantLinear.from_linear(linear, scheme, seen).codes()
        quantizing = (time.perf_counter() - begun) / linear.weight.nbytes
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=disk) as file:
        begun = time.perf_counter()
        file.write(written.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
        writing = (time.perf_counter() - begun) / written.nbytes
    return sum(quantizing * needs.read + writing * needs.written for needs in planned.values())


def _finished(
    config: PTQConfig, folder: Path, config_yaml: str, model: Path, recipe: Recipe
) -> tuple[dict[str, Any], bool]:
    """The run's result, and whether it was not known already."""
    target = Path(config.convert.to) if config.convert.to else folder / "checkpoint"
    signed = signature_of(model, recipe)
    names = {group: {"name": getattr(config, group).name} for group in ("model", "quant", "protect")}
    if not config.force and target.is_dir() and (folder / "result.json").is_file():
        result = read_result(folder)
        if result["status"] == "ok" and result.get("asked") == signed:
            print(f"finished already: {folder}; force=true runs it again", flush=True)
            return result, False
    if config.convert.to and target.exists():
        raise ValueError(f"convert.to={target} is there already: choose another folder, or remove it")
    run = Run(folder, "ptq", config_yaml, names)
    try:
        result = {**_convert(config, run, model, recipe, target, signed), "asked": signed}
        full = run.finish(result, lambda complete: write_report(run.folder, complete))
    except BaseException as error:
        run.fail(error)
        raise
    print(summary(full, run.folder))
    return full, True


def signature_of(model: Path, recipe: Recipe) -> str:
    """By the names, sizes and times of the files: to read them for it would be to read them twice."""
    what = {name: Source.of(part).identity() for name, part in transformers_of(model).items()}
    asked = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "stats"}
    asked["config"].pop("name")
    stats = recipe.stats and {name: _told(seen) for name, seen in recipe.stats.items()}
    return digest({"folder": str(model.resolve()), "files": what, "asked": asked, "stats": stats})


def _told(seen: float | Site) -> Any:
    return seen if isinstance(seen, float) else [seen.largest(), seen.mean_square().tolist()]


def _convert(config: PTQConfig, run: Run, model: Path, recipe: Recipe, target: Path, signed: str) -> dict[str, Any]:
    """Writes to ``target``, whole or not at all; takes up what was left of the same conversion."""
    planned = needs_of(model, recipe)
    partial = target.with_name(f"{target.name}.partial")
    if not config.convert.to:  # where a later run, which has another directory, finds it
        partial = Path(config.cache) / "converting" / signed
    seconds = probed_seconds(planned, model, recipe, Path(config.cache))
    forget_peak_memory(CPU)
    begun = peak_memory(CPU)
    lock = Path(config.cache) / "converting" / f"{digest(str(partial.resolve()))}.lock"
    with locked(lock, str(target)):
        partial.mkdir(parents=True, exist_ok=True)
        with run.stage("convert"):
            streamed = {name: _stream(name, needs, model, partial, recipe, signed) for name, needs in planned.items()}
        peak = peak_memory(CPU)
        with run.stage("copy"):
            copied = _copy(model, partial)
        shutil.move(partial, target)
    return {
        **_head(config, model, recipe, signed),
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


def _stream(name: str, needs: Needs, model: Path, partial: Path, recipe: Recipe, signed: str) -> Streamed:
    begun, read = time.monotonic(), 0
    with progress(f"convert {name}".rstrip(), needs.parts, "block") as tick:

        def on_block(size: int) -> None:
            nonlocal read
            read += size
            tick(f"{in_bytes(read / max(time.monotonic() - begun, 1e-3))}/s read")

        return convert_transformer(transformers_of(model)[name], partial / name, recipe, signed, on_block)


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


def _head(config: PTQConfig, model: Path, recipe: Recipe, signed: str) -> dict[str, Any]:
    shape = first_shape(model)
    return {
        "signature": signed,
        "mode": config.mode,
        "model": {
            "name": config.model.name,
            "blocks": len(shape.blocks),
            "parameters": sum(p.numel() for p in shape.parameters()),
            "fingerprint": None,
        },
        "quant": dataclasses.asdict(config.quant),
        "protect": {
            "name": config.protect.name,
            "blocks": list(plan_conversion(shape, recipe.config, recipe.protected_blocks).protected_blocks),
            "modules": list(recipe.protected_modules),
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
