"""``mode=convert``: a pipeline quantized from files to files, without ever being loaded, whatever its size.

Weights are summed, then converted a few blocks at a time (``wanquant.wan.checkpoints.stream``), and what else
belongs to the pipeline is copied. Nothing is generated, so nothing is said about quality: load what it makes, and
measure that.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wanquant.ptq.config import PTQConfig
from wanquant.ptq.convert_plan import CPU, ConvertPlan, print_convert_plan, probed_seconds, resolve_convert, with_files
from wanquant.ptq.result import names_of, overflow
from wanquant.runs.cache import locked
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.finished import in_use
from wanquant.runs.progress import progress
from wanquant.runs.reports.report import summary, write_report
from wanquant.runs.run import Run, digest, read_result, refused_leave_no_result
from wanquant.runs.signature import provenance
from wanquant.runs.tracking import mirror
from wanquant.wan.checkpoints.checkpoint import TRANSFORMERS, read_json
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.checkpoints.stream import Streamed, convert_transformer
from wanquant.wan.checkpoints.sums import seal
from wanquant.wan.device import forget_peak_memory, give_back_freed_memory, peak_memory
from wanquant.wan.load import hush_libraries, tell_dequantized
from wanquant.wan.resources.printed import in_bytes


def run_convert(config: PTQConfig, folder: Path, config_yaml: str) -> dict[str, Any] | None:
    """As ``run_ptq``."""
    with refused_leave_no_result(folder) if not config.dry_run else nullcontext():
        plan = resolve_convert(config)  # refused before anything is fetched
        torch.set_num_threads(config.threads)
        if not config.dry_run:
            plan = with_files(plan)
    print(f"{config.quant.name} on {config.model.name}, protect {config.protect.name}: from files to files", flush=True)
    hush_libraries()
    if config.dry_run:
        print_convert_plan(plan, config_yaml)
        return None
    target = Path(config.convert.to) if config.convert.to else folder / "checkpoint"
    with in_use(Path(config.cache), folder):
        result = None if config.force else _finished(plan, folder, target)
        if result is not None:
            return result
        result = _carry_out(plan, folder, target, config_yaml)
    mirror(config.tracker, folder, dataclasses.asdict(plan.config), result)
    return result


def _finished(plan: ConvertPlan, folder: Path, target: Path) -> dict[str, Any] | None:
    """The result of the same conversion to the same place, if it is there; ``ValueError`` if another is."""
    if target.is_dir() and (folder / "result.json").is_file():
        result = read_result(folder)
        if result["status"] == "ok" and result.get("asked") == plan.signature:
            print(f"finished already: {folder}; force=true runs it again", flush=True)
            return result
    note = _note(plan, target)
    if plan.config.convert.to and target.is_dir() and note.is_file():
        told = read_json(note)
        if told["asked"] == plan.signature and (Path(told["run"]) / "result.json").is_file():
            print(f"finished already: {target}, by {told['run']}", flush=True)
            return read_result(Path(told["run"]))
    return None


def _note(plan: ConvertPlan, target: Path) -> Path:
    """Where it is remembered which run has made the target."""
    return plan.working / f"{digest(str(target.resolve()))}.json"


def _carry_out(plan: ConvertPlan, folder: Path, target: Path, config_yaml: str) -> dict[str, Any]:
    if plan.config.convert.to and target.exists():
        raise ValueError(f"convert.to={target} is there already: choose another folder, or remove it")
    run = Run(folder, "ptq", config_yaml, names_of(plan.config))
    try:
        result = {**_convert(plan, run, target), "asked": plan.signature}
        full = run.finish(result, lambda complete: write_report(run.folder, complete))
    except BaseException as error:
        run.fail(error)
        raise
    write_atomic(_note(plan, target), json.dumps({"asked": plan.signature, "run": str(run.folder.resolve())}) + "\n")
    print(summary(full, run.folder))
    return full


def _convert(plan: ConvertPlan, run: Run, target: Path) -> dict[str, Any]:
    """Writes to ``target``, whole or not at all; takes up what was left of the same conversion."""
    partial = target.with_name(f"{target.name}.partial")
    if not plan.config.convert.to:  # where a later run, which has another directory, finds it
        partial = plan.working / plan.signature
    give_back_freed_memory()
    seconds = probed_seconds(plan)
    forget_peak_memory(CPU)
    begun = peak_memory(CPU)
    with locked(plan.working / f"{digest(str(partial.resolve()))}.lock", str(target)):
        with run.stage("convert"):
            streamed = _stream_all(plan, partial)
        peak = peak_memory(CPU)
        with run.stage("copy"):
            copied = _copy(plan.files, partial)
            seal(partial, {path: sum_ for part in streamed.values() for path, sum_ in part.sums.items()})
            near = target.with_name(f"{target.name}.partial")
            shutil.move(partial, near)  # the cache may be on another disk
            near.rename(target)
    memory = {
        "peak_bytes": peak,
        "begun_bytes": begun,
        "planned_bytes": begun + max(needs.memory for needs in plan.needs),
    }
    convert = {
        "checkpoint": str(target),
        "read_bytes": sum(part.read for part in streamed.values()),
        "written_bytes": sum(part.written for part in streamed.values()),
        "planned_bytes": sum(needs.written for needs in plan.needs),
        "planned_seconds": seconds,
        "copied_bytes": copied,
        "files": {name: part.needs.files for name, part in plan.parts.items()},
    }
    return {**_head(plan), **_counts(streamed), "memory": memory, "convert": convert, "provenance": provenance(CPU)}


def _stream_all(plan: ConvertPlan, partial: Path) -> dict[str, Streamed]:
    partial.mkdir(parents=True, exist_ok=True)
    try:
        return {name: _stream(plan, name, partial) for name in plan.parts}
    except ValueError:  # another source is another conversion: nothing would take up what is there
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _stream(plan: ConvertPlan, name: str, partial: Path) -> Streamed:
    begun, read, part = time.monotonic(), 0, plan.parts[name]
    tell_dequantized(part.source)
    with progress(f"convert {name}".rstrip(), part.needs.parts, "block") as tick:

        def on_block(size: int) -> None:
            nonlocal read
            read += size
            tick(f"{in_bytes(read / max(time.monotonic() - begun, 1e-3))}/s read")

        return convert_transformer(part.source, partial / name, part.recipe, plan.signature, on_block)


def _copy(model: ModelFiles, partial: Path) -> int:
    """All of the pipeline that is not quantized; bytes."""
    if not model.is_pipeline:
        return 0
    files = [path for path in sorted(model.folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.relative_to(model.folder).parts[0] not in TRANSFORMERS]
    with progress("copy", len(files), "file") as tick:
        for path in files:
            there = partial / path.relative_to(model.folder)
            if not there.is_file():
                with replacing(there) as temporary:
                    shutil.copyfile(path, temporary)
            tick()
    return sum(path.stat().st_size for path in files)


def _head(plan: ConvertPlan) -> dict[str, Any]:
    config, protected, first = plan.config, list[int](), 0
    for part in plan.parts.values():
        protected += [first + index for index in part.report.protected_blocks]
        first += part.report.blocks
    parameters = sum(p.numel() for part in plan.parts.values() for p in part.shape.parameters())
    return {
        "signature": plan.signature,
        "mode": config.mode,
        "model": {
            "name": config.model.name,
            "blocks": first,
            "parameters": parameters,
            "fingerprint": plan.fingerprint,
            "source": plan.files.told,
        },
        "quant": dataclasses.asdict(config.quant),
        "protect": {"name": config.protect.name, "blocks": protected, "modules": list(config.protect.modules)},
        "generation": dataclasses.asdict(config.model.generation),
    }


def _counts(streamed: Mapping[str, Streamed]) -> dict[str, Any]:
    counts = [part.report.counts() for part in streamed.values()]
    overflowed = {name: count for part in streamed.values() for name, count in sorted(part.overflowed.items())}
    return {
        "conversion": {status: sum(each[status] for each in counts) for status in counts[0]},
        "overflow": overflow(Counter(), overflowed),  # nothing was put in
    }
