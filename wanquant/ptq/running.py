"""A job that quantizes a model, from its config to its end: found finished, carried out, or helped with."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wanquant.evaluate.job import judge_run
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.plan import PTQPlan, with_weights
from wanquant.ptq.result import evaluations_in
from wanquant.quant.eight_bit import check_product
from wanquant.runs import launch
from wanquant.runs.finished import by, in_use
from wanquant.runs.run import Run, read_result, refused_leave_no_result
from wanquant.runs.tracking import mirror
from wanquant.wan.device import one_card
from wanquant.wan.load import hush_libraries

if TYPE_CHECKING:
    from wanquant.ptq.job import Job


def run_job(config: PTQConfig, folder: Path, config_yaml: str, kind: type[Job]) -> dict[str, Any] | None:
    """``run_ptq`` for any job that quantizes a model and measures what became of it. Of a launch's processes the first
    writes it all, and the others make what that is not at."""
    if not launch.first():
        _assist(config, kind)
        return None
    with refused_leave_no_result(folder) if not config.dry_run else nullcontext():
        plan = kind.resolve(config)
        torch.set_num_threads(plan.config.threads)
        if not config.dry_run:
            check_product(plan.scheme, plan.device)
            plan = with_weights(plan)
    print(plan, flush=True)
    hush_libraries()
    if config.dry_run:
        kind.print_estimate(plan, config_yaml)
        return None
    result, fresh = _finished(plan, folder, config_yaml, kind)
    launch.say("finished")
    if config.eval.dimensions and config.mode == "quantize":
        result, fresh = judge_run(folder, config.eval, Path(config.cache), plan.device), True
    if fresh:
        mirror(config.tracker, folder, dataclasses.asdict(plan.config), result)
    return result


def _assist(config: PTQConfig, kind: type[Job]) -> None:
    """What another process of a launch does, when the first has found that there is something to do."""
    folder, to_do = launch.hear("begin")
    hush_libraries()
    torch.set_num_threads(config.threads)
    plan = with_weights(kind.resolve(config))
    if to_do:
        with one_card(plan.device) as card:
            job = kind(dataclasses.replace(plan, device=card))
            job.analyze() if config.mode == "analyze" else job.run()
    if config.eval.dimensions and config.mode == "quantize":
        launch.hear("finished")
        judge_run(Path(folder), config.eval, Path(config.cache), plan.device)


def _finished(plan: PTQPlan, folder: Path, config_yaml: str, kind: type[Job]) -> tuple[dict[str, Any], bool]:
    """The run's result, and whether it was not known already."""
    # A process whose launcher was killed may still be at it.
    with in_use(Path(plan.config.cache), folder), one_card(plan.device) as card:
        with refused_leave_no_result(folder):
            job = kind(dataclasses.replace(plan, device=card))
            known = None if plan.config.force else job.finished(folder)
        if known is not None and known.resolve() == folder.resolve():
            result = read_result(folder)
            if all(result[group].items() >= given.items() for group, given in job.names.items()):
                launch.say("begin", (str(folder), False))
                print(f"finished already: {folder}{by(result)}; force=true runs it again", flush=True)
                return result, False
            known = None  # under other names: most of it is in the cache
        launch.say("begin", (str(folder), known is None))
        kept = evaluations_in(folder, job.asked)
        run = Run(folder, job.name, config_yaml, job.names, keep=("evaluations",) if kept else ())
        return job.carry_out(run, known, kept), True
