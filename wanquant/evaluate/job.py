"""The evaluation job: the verdict on a run, on each run of a sweep, or on a model.

config → plan (``wanquant.evaluate.plan``) → load, generate, measure, judge (``wanquant.evaluate.evaluation``) → write →
report. Of a run, what is found joins its ``result.json``, under ``evaluations``; of a model it makes a run of its own.
Several processes that are given the same job share it through the cache, and the first of a launch writes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate.config import EvalConfig, EvaluateConfig
from wanquant.evaluate.evaluation import Evaluation, EvaluationPlan, Side
from wanquant.evaluate.judges import perceptual
from wanquant.evaluate.judges.judging import merged
from wanquant.evaluate.plan import EvaluatePlan, RunPlan, resolve_evaluate, resolve_run
from wanquant.evaluate.prompts import OWN
from wanquant.evaluate.sweep.tables import report, text
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse
from wanquant.runs import launch
from wanquant.runs.cache import Cache
from wanquant.runs.files import link_or_copy
from wanquant.runs.finished import in_use
from wanquant.runs.reports.evaluation import evaluation_summary
from wanquant.runs.reports.report import write_report
from wanquant.runs.run import Run, read_result, refused_leave_no_result, write_result
from wanquant.runs.signature import signature
from wanquant.runs.tracking import mirror
from wanquant.wan.checkpoints.checkpoint import config_of
from wanquant.wan.checkpoints.find import shape_of
from wanquant.wan.device import forget_peak_memory, one_card, peak_memory, pick_device
from wanquant.wan.experts import shape_of_whole
from wanquant.wan.families import block_names, block_of
from wanquant.wan.load import hush_libraries
from wanquant.wan.lora import check_loras, describe_loras
from wanquant.wan.outliers import chosen_blocks
from wanquant.wan.resources.choice import choose
from wanquant.wan.resources.estimate import GUESS, ResourceEstimate, VideoCounts
from wanquant.wan.resources.placement import Placement
from wanquant.wan.resources.printed import in_time, print_needs

#: What a model that nothing was done to has for the names of its quantization and protection.
AS_IT_IS = {"quant": {"name": "as it is"}, "protect": {"name": "as it is"}}


def run_evaluate(config: EvaluateConfig, folder: Path, config_yaml: str) -> list[dict[str, Any]]:
    """Evaluates, and returns the results as written. ``ValueError`` and ``OSError`` are the user's."""
    torch.set_num_threads(config.threads)
    hush_libraries()
    device = pick_device(config.model.device)
    if config.dry_run:
        _print(resolve_evaluate(config, device))
        return []
    with one_card(device) as card:
        with refused_leave_no_result(folder) if config.run is None else nullcontext():
            plan = resolve_evaluate(config, card)
        if plan.model is None:
            return _of_runs(plan, card)
        return [_of_model(plan.model, config, folder, config_yaml, card)]


def judge_run(run: Path, config: EvalConfig, cache_root: Path, device: torch.device) -> dict[str, Any]:
    """Evaluates a finished run on its own prompts, and joins what is found to its result and report; VBench's scores
    that are in the cache are taken from there. What keeps it from that is noted in the result, so that a sweep's table
    and exit status can tell, whichever process this was."""
    try:
        with one_card(device) as card:
            return _joined(resolve_run(run, config, card, torch.get_num_threads()), cache_root, card)[0]
    except (ValueError, OSError) as error:
        if launch.first():
            with in_use(cache_root, run):
                write_result(run, {**read_result(run), "not_judged": str(error).splitlines()[0]})
        raise


def _of_runs(plan: EvaluatePlan, device: torch.device) -> list[dict[str, Any]]:
    """One after the other; of a sweep, those that can be evaluated, and its table."""
    results, failed = [], []
    for run, entry in plan.runs.items():
        try:
            results.append(_of_run(entry, plan.config, device))
        except (ValueError, OSError) as error:
            if plan.sweep is None:
                raise
            failed.append(f"{run.name}: {error}")
    if plan.sweep is not None and results and launch.first():
        print(text(report(plan.sweep), plan.sweep), flush=True)
    if failed:
        raise ValueError(f"not evaluated: {'; '.join(failed)}")
    return results


def _of_run(plan: RunPlan | Exception, config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    if isinstance(plan, Exception):
        raise plan
    result, key = _joined(plan, Path(config.cache), device, config.model.offload)
    if launch.first():
        entry = result["evaluations"][key]
        told = {"job": "eval", "evaluations": {key: entry}, "timings": entry["timings"]}
        mirror(config.tracker, plan.run, dataclasses.asdict(config), told)
    return result


def _joined(plan: RunPlan, cache_root: Path, device: torch.device, offload: str = "auto") -> tuple[dict[str, Any], str]:
    """The run's result with what is found, and under which key of ``evaluations`` that is."""
    run, result, key = plan.run, plan.result, plan.folder.name
    shown = f"{plan.name} prompts, {len(plan.pairs)} pairs"
    print(f"{run}: {result['quant']['name']}, protect {result['protect']['name']}, {shown}", flush=True)
    entry = _evaluation(plan, device, cache_root, offload).run()
    if plan.name == OWN:
        entry = _own(entry, result)
    if not launch.first():
        return result, key
    with in_use(cache_root, run):
        result = read_result(run)  # another process may have joined something since
        entry = merged(result.setdefault("evaluations", {}).get(key, {}), entry)
        result["evaluations"][key] = entry
        result.pop("not_judged", None)
        write_report(run, result)
        write_result(run, result)
    print(evaluation_summary(key, entry, run), flush=True)
    return result, key


def _evaluation(plan: EvaluationPlan, device: torch.device, cache_root: Path, offload: str) -> Evaluation:
    def place(side: Side) -> Placement:
        needs, told = choose(_estimate(side, len(plan.pairs), device), offload)
        if told:
            print(told, flush=True)
        return Placement(device, needs.offload, cache_root / "offload")

    return Evaluation(plan, device, Cache(cache_root), place)


def _own(entry: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Of a run's own prompts only what the run itself has not measured."""
    metrics = {name: metric for name, metric in entry["metrics"].items() if name not in result["metrics"]}
    failed = [name for name, gate in result["gates"].items() if gate["verdict"] == "fail"]
    return {**entry, "metrics": metrics, "gates": {}, "gates_failed": failed, "verdict": result["verdict"]}


def _of_model(
    plan: EvaluationPlan, config: EvaluateConfig, folder: Path, config_yaml: str, device: torch.device
) -> dict[str, Any]:
    """Its videos lie in the cache, for all processes of a launch; the first makes a run of them."""
    with refused_leave_no_result(folder):
        plan = _in_cache(plan, config, device)
    evaluation = _evaluation(plan, device, Path(config.cache), config.model.offload)
    if not launch.first():
        return {"evaluations": {plan.name: evaluation.run()}}
    offload = config.model.offload  # one side after the other
    estimates = [choose(_estimate(side, len(plan.pairs), device), offload)[0] for side in plan.sides]
    told = f"{in_time(sum(each.seconds for each in estimates))} for the videos; what the cache holds takes none"
    print(f"predicted: {told}{GUESS if any(each.guess for each in estimates) else ''}", flush=True)
    forget_peak_memory(device)
    begun = peak_memory(device)
    with in_use(Path(config.cache), folder):
        run = Run(folder, "eval", config_yaml, {"model": {"name": config.model.name}, **AS_IT_IS})
        try:
            entry = evaluation.run()
            shutil.copytree(plan.folder, folder / "evaluations" / plan.name, copy_function=link_or_copy)
            result = _result(plan, config, entry, device, estimates, begun)
            full = run.finish(result, lambda done: write_report(folder, done))
        except BaseException as error:
            run.fail(error)
            raise
    print(evaluation_summary(plan.name, entry, folder), flush=True)
    mirror(config.tracker, folder, dataclasses.asdict(config), full)
    return full


def _in_cache(plan: EvaluationPlan, config: EvaluateConfig, device: torch.device) -> EvaluationPlan:
    """With the folder of the cache for videos of these models, whose files are read."""
    plan = plan.identified()
    fingerprints = [side.fingerprint for side in plan.sides]
    model = dataclasses.asdict(dataclasses.replace(config.model, offload="auto"))  # which changes no number
    counted: dict[str, Any] = {"pairs": plan.pairs, "config": model, "sides": fingerprints}
    shown = [each.sha256 for each in plan.sides[0].pictures.values()]
    counted |= {"pictures": shown} if shown else {}
    return dataclasses.replace(plan, folder=Path(config.cache) / "videos" / signature(counted, "", device))


def _result(
    plan: EvaluationPlan,
    config: EvaluateConfig,
    entry: dict[str, Any],
    device: torch.device,
    estimates: Sequence[ResourceEstimate],
    begun: int,
) -> dict[str, Any]:
    """What ``result.json`` has of a model as it is; ``begun`` are bytes in use before its videos are made."""
    side = plan.sides[0]
    blocks = len(shape_of_whole(side.source).blocks)
    return {
        "mode": "evaluate",
        "signature": signature(dataclasses.asdict(config), side.fingerprint, device),
        "model": {
            "name": config.model.name,
            "blocks": blocks,
            "batch": side.model.batch,
            "fingerprint": side.fingerprint,
            "outliers": list(chosen_blocks(config.model.outliers, blocks)),
            "source": side.source.told,
            "lora": describe_loras(side.model),
        },
        **AS_IT_IS,
        "generation": dataclasses.asdict(config.model.generation),
        "verdict": entry["verdict"],
        "evaluations": {entry["prompts"]: entry},
        "memory": {
            "peak_bytes": peak_memory(device),
            "begun_bytes": begun,
            "planned_bytes": begun + max(each.added for each in estimates),
        },
        "planned": {"seconds": sum(each.seconds for each in estimates)},
        "provenance": entry["provenance"],
    }


def _print(plan: EvaluatePlan) -> None:
    """What would be done, and what generating takes of memory and time."""
    config = plan.config
    for folder, run in plan.runs.items():
        if isinstance(run, Exception):
            raise run
        lacking = sum(not run.is_there(pair) for pair in run.pairs)
        print(f"{folder}: {len(run.pairs)} pairs of {run.name}, of which {lacking} would be generated")
        for side in run.sides if lacking else ():
            if side.source.is_pipeline:
                _print_needs(side, lacking, plan)
    if plan.model is not None:
        beside, sides, count = config.reference or "nothing", plan.model.sides, len(plan.model.pairs)
        made = f"{count} pairs of {plan.model.name}, {count * len(sides)} videos"
        print(f"{config.model.path} beside {beside}: {made}")
        for side in sides:
            _print_needs(side, count, plan)
    lpips = perceptual.settled(config.eval.lpips)
    print(f"dimensions of VBench: {', '.join(config.eval.dimensions) or 'none'}; LPIPS {lpips}")


def _print_needs(side: Side, videos: int, plan: EvaluatePlan) -> None:
    needs, told = choose(_estimate(side, videos, plan.device), plan.config.model.offload)
    print_needs(needs, side.name, told=told)


def _estimate(side: Side, videos: int, device: torch.device) -> ResourceEstimate:
    """Of generating so many, kept as files; what judges need is not in it."""
    quant, names, first = QuantConfig(format="bf16"), list[str](), 0
    for part in side.source.transformers.values():
        described, shape = part.quantization, shape_of(part)
        if described is not None:
            quant = config_of(described)
            for name in described["modules"]:
                block = block_of(name, shape)
                assert block is not None  # what is quantized is in one
                names.append(f"blocks.{first + block}.{name.split('.', 2)[2]}")
        first += len(block_names(shape))
    counts = VideoCounts(0, videos, videos) if names else VideoCounts(videos, 0, videos)
    settings, rows = side.model.generation, min(side.model.batch, videos)
    loras = check_loras(side.model, shape_of_whole(side.source))
    how = (settings, counts, rows, device, names or None)
    return ResourceEstimate(side.source, parse(quant), (), (), *how, loras=loras)
