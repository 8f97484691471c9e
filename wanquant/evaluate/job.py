"""The evaluation job: the verdict on a run, on each run of a sweep, or on a model.

Of a run, what is found joins its ``result.json``, under ``evaluations``, and its report; of a model it makes a run of
its own. Several processes that are given the same job share it through the cache, and the first of a launch writes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanquant.choices import check_choices
from wanquant.evaluate import perceptual
from wanquant.evaluate.check import check_eval
from wanquant.evaluate.config import EvalConfig, EvaluateConfig
from wanquant.evaluate.evaluation import Evaluation, Side, Values, hash_of
from wanquant.evaluate.judging import merged
from wanquant.evaluate.planning import needed_by, plan_of
from wanquant.evaluate.prompts import PromptsConfig, pairs, settled
from wanquant.evaluate.sweep import jobs_of
from wanquant.evaluate.tables import report, text
from wanquant.quant.scheme import parse
from wanquant.runs.cache import Cache
from wanquant.runs.files import link_or_copy
from wanquant.runs.finished import in_use
from wanquant.runs.reports.evaluation import evaluation_summary
from wanquant.runs.reports.report import write_report
from wanquant.runs.run import Run, read_config, read_result, refused_leave_no_result, write_result
from wanquant.runs.signature import provenance, signature
from wanquant.runs.tracking import mirror
from wanquant.wan.cached import Pair
from wanquant.wan.checkpoint import config_of, quantization_of
from wanquant.wan.config import GenerationConfig, ModelConfig, OutliersConfig
from wanquant.wan.device import forget_peak_memory, one_card, peak_memory, pick_device
from wanquant.wan.estimate import GUESS, in_time, print_needs
from wanquant.wan.experts import shape_of_whole
from wanquant.wan.generate import check_guidance
from wanquant.wan.load import check_folder, find_folder, hush_libraries, transformers_of
from wanquant.wan.outliers import chosen_blocks
from wanquant.wan.tiny import parse_caption

#: The prompts a run was made with, and the name of their evaluation.
OWN = "own"
#: What of a run's provenance has to be as it is now for its figures to stand beside new ones.
SAME = ("packages", "device", "device_name", "threads", "instructions")


def run_evaluate(config: EvaluateConfig, folder: Path, config_yaml: str) -> list[dict[str, Any]]:
    """Evaluates, and returns the results as written. ``ValueError`` and ``OSError`` are the user's."""
    _check(config)
    torch.set_num_threads(config.threads)
    device = pick_device(config.model.device)
    hush_libraries()
    if config.run is None:
        return _planned(config, []) if config.dry_run else [_of_model(config, folder, config_yaml, device)]
    where = Path(config.run)
    sweep = not (where / "result.json").is_file() and _is_sweep(where)
    runs = jobs_of(where) if sweep else [where]
    if config.dry_run:
        return _planned(config, runs)
    results, failed = [], []
    with one_card(device) as card:
        for run in runs:
            try:
                results.append(_of_one(run, config, card))
            except (ValueError, OSError) as error:
                if not sweep:
                    raise
                failed.append(f"{run.name}: {error}")
    if sweep and results and _writes():
        print(text(report(where), where), flush=True)
    if failed:
        raise ValueError(f"not evaluated: {'; '.join(failed)}")
    return results


def _check(config: EvaluateConfig) -> None:
    check_choices(config)
    check_eval(config.eval)
    if config.threads < 1:
        raise ValueError(f"threads={config.threads}: must be at least 1")
    if config.eval.block_sqnr:
        raise ValueError("eval.block_sqnr=true is measured by ptq.py, with the calibration prompts")
    if Path(config.prompts.name).name != config.prompts.name:
        raise ValueError(f"prompts.name={config.prompts.name}: a folder is named so, leave / and .. out")
    if config.run is not None and config.model.path != "tiny":
        raise ValueError("run= knows its model: leave model.path out, or say where it is now with reference=<folder>")
    if config.run is None and config.reference is None and config.eval.lpips == "on":
        raise ValueError("eval.lpips=on compares with a reference: give reference=<folder>")


def _of_one(run: Path, config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    result, key = evaluate_run(run, config.eval, Path(config.cache), device, config.prompts, config.reference)
    if _writes():
        entry = result["evaluations"][key]
        told = {"job": "eval", "evaluations": {key: entry}, "timings": entry["timings"]}
        mirror(config.tracker, run, dataclasses.asdict(config), told)
    return result


def evaluate_run(
    run: Path,
    config: EvalConfig,
    cache_root: Path,
    device: torch.device,
    prompts: PromptsConfig | None = None,
    reference: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Evaluates a finished run on its own prompts or others, and joins what is found to its result and report. Returns
    the result, and under which key of ``evaluations`` that is."""
    result = _evaluable(run)
    evaluation = _of_run(run, result, config, Cache(cache_root), device, prompts, reference)
    _refuse_prompts(evaluation)
    key = evaluation.folder.name
    shown = f"{evaluation.name} prompts, {len(evaluation.pairs)} pairs"
    print(f"{run}: {result['quant']['name']}, protect {result['protect']['name']}, {shown}", flush=True)
    entry = evaluation.run()
    if evaluation.name == OWN:
        entry = _own(entry, result)
    if not _writes():
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


def note_not_judged(run: Path, cache_root: Path, error: BaseException) -> None:
    """So that a sweep's table and exit status can tell, whichever process this was."""
    with in_use(cache_root, run):
        write_result(run, {**read_result(run), "not_judged": str(error).splitlines()[0]})


def _writes() -> bool:
    """Of the processes of one ``accelerate launch`` the first: the others have shared the work."""
    return os.environ.get("RANK", "0") == "0"


def _is_sweep(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and path.name.isdigit() for path in folder.iterdir())


def _evaluable(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    result = read_result(run)
    if result["status"] != "ok":
        raise ValueError(f"{run} failed ({result['error']}): there is nothing to evaluate")
    if result.get("mode") != "quantize":
        raise ValueError(f"{run} is no quantization: give a run or a sweep of ptq.py")
    return result


def _of_run(
    run: Path,
    result: dict[str, Any],
    config: EvalConfig,
    cache: Cache,
    device: torch.device,
    prompts: PromptsConfig | None,
    reference: str | None,
) -> Evaluation:
    model = _model_of(run, result)
    own = [(item["prompt"], item["seed"]) for item in result["metrics"]["psnr"]["per_item"]]
    asked, name = _asked(prompts, own, model.language)
    new = [pair for pair in asked if pair not in set(own)]
    # What the run has measured elsewhere, or by other libraries, does not stand beside what is measured now.
    ours = [pair for pair in own if pair in set(asked)] if not new or _same_machine(result, device) else []
    new = [pair for pair in asked if pair not in set(ours)]
    files = {side: _files(run, side, own, ours) for side in ("quantized", "bf16", "bf16_ulp")}
    made_from = find_folder(reference or model.path, shapes_only=True)
    plain = dataclasses.replace(model, outliers=OutliersConfig())
    converted = result["conversion"]["converted"]
    fingerprint = result["model"]["fingerprint"]
    sides = [
        Side("quantized", "", run / "checkpoint", plain, files["quantized"])
        if converted
        else Side("quantized", "", made_from, model, files["quantized"], fingerprint),
        Side("bf16", "bf16.", made_from, model, files["bf16"], fingerprint),
    ]
    if config.noise_floor and len(files["bf16_ulp"]) == len(ours):
        sides.append(_perturbed(sides[1], files["bf16_ulp"]))
    known = {pair: value for pair, value in _measured(result, own).items() if pair in set(ours)}
    there = result.get("evaluations", {}).get(name)
    key = name if there is None or there["prompt_hash"] == hash_of(asked) else f"{name}-{hash_of(asked)[:8]}"
    lists = [pairs_ for pairs_ in (ours, new) if pairs_]
    official = prompts is not None and prompts.official
    return Evaluation(name, run / "evaluations" / key, sides, lists, config, device, cache, official, known)


def _perturbed(side: Side, files: dict[Pair, Path]) -> Side:
    return dataclasses.replace(side, name="bf16_ulp", prefix="floor_ulp.", files=files, how={"perturbed": "1 ulp"})


def _asked(prompts: PromptsConfig | None, own: Sequence[Pair], language: str) -> tuple[list[Pair], str]:
    """The pairs, in the language of the model, and their name: ``own`` are those of the run, the texts and seeds of
    which ``prompts=own`` stands for, where it is not given others."""
    if prompts is None:
        return list(own), OWN
    prompts = settled(prompts)
    texts = prompts.texts
    if texts in prompts.by_language.values():
        texts = prompts.by_language.get(language, texts)
    if prompts.name == OWN and not texts:
        texts = list(dict.fromkeys(text for text, _ in own))
    seeds = prompts.seeds or list(dict.fromkeys(seed for _, seed in own))
    asked = pairs(dataclasses.replace(prompts, texts=texts, seeds=seeds))
    if asked == list(own):
        return asked, OWN
    return asked, f"{OWN}-{hash_of(asked)[:8]}" if prompts.name == OWN else prompts.name


def _same_machine(result: dict[str, Any], device: torch.device) -> bool:
    now = provenance(device)
    return all(result["provenance"].get(key) == now[key] for key in SAME)


def _files(run: Path, side: str, own: Sequence[Pair], wanted: Sequence[Pair]) -> dict[Pair, Path]:
    paths = {pair: run / "videos" / side / f"{place:03d}-seed{pair[1]}.mp4" for place, pair in enumerate(own)}
    return {pair: path for pair, path in paths.items() if pair in set(wanted) and path.is_file()}


def _measured(result: dict[str, Any], own: Sequence[Pair]) -> dict[Pair, Values]:
    """What the run itself has measured of its pairs, and an earlier evaluation of them; a null is a NaN."""
    metrics = {**result.get("evaluations", {}).get(OWN, {}).get("metrics", {}), **result["metrics"]}
    found: dict[Pair, Values] = {pair: {"metrics": {}, "figures": {}} for pair in own}
    for name, metric in metrics.items():
        if not name.startswith(("floor_seed.", "difference.")) and "vbench." not in name:
            for item in metric["per_item"]:
                value = item["value"]
                found[item["prompt"], item["seed"]]["metrics"][name] = float("nan") if value is None else value
    for name, gate in result["gates"].items():
        for pair, figure in zip(own, gate["per_item"], strict=True):
            found[pair]["figures"][name] = float("nan") if figure is None else figure
    return found


def _own(entry: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Of a run's own prompts only what the run itself has not measured."""
    metrics = {name: metric for name, metric in entry["metrics"].items() if name not in result["metrics"]}
    failed = [name for name, gate in result["gates"].items() if gate["verdict"] == "fail"]
    return {**entry, "metrics": metrics, "gates": {}, "gates_failed": failed, "verdict": result["verdict"]}


def _model_of(run: Path, result: dict[str, Any]) -> ModelConfig:
    """As the run asked it, in the batches it was asked in."""
    raw = read_config(run)["model"]
    nested = {"generation": GenerationConfig(**raw["generation"]), "outliers": OutliersConfig(**raw["outliers"])}
    return ModelConfig(**{**raw, **nested, "batch": result["model"]["batch"]})


def _refuse_prompts(evaluation: Evaluation) -> None:
    if evaluation.scenes:
        for prompt, _ in evaluation.pairs:
            parse_caption(prompt)


def _of_model(config: EvaluateConfig, folder: Path, config_yaml: str, device: torch.device) -> dict[str, Any]:
    """Its videos lie in the cache, for all processes of a launch; the first makes a run of them."""
    names = {"model": {"name": config.model.name}, "quant": {"name": "as it is"}, "protect": {"name": "as it is"}}
    with refused_leave_no_result(folder):
        asked, name = _asked_of_model(config)
        sides = [_side("model", "", config.model, config.model.path)]
        if config.reference is not None:
            model = dataclasses.replace(config.model, batch=sides[0].model.batch)
            sides.append(_side("bf16", "bf16.", model, config.reference))
            sides += [_perturbed(sides[1], {})] if config.eval.noise_floor else []
    with one_card(device) as card, refused_leave_no_result(folder):
        for side in sides:
            side.identify()
        counted = {"pairs": asked, "config": dataclasses.asdict(config.model), "sides": [s.fingerprint for s in sides]}
        videos = Path(config.cache) / "videos" / signature(counted, "", card)
        official = config.prompts.official
        cache = Cache(Path(config.cache))
        evaluation = Evaluation(name, videos, sides, [asked], config.eval, card, cache, official)
        _refuse_prompts(evaluation)
        needed = needed_by(sides, len(asked), card) if _writes() else {}
        if needed:
            told = f"{in_time(needed['seconds'])} for the videos; what the cache holds takes none"
            print(f"predicted: {told}{GUESS if needed['guess'] else ''}", flush=True)
        forget_peak_memory(card)
        needed["begun"] = peak_memory(card)
        if not _writes():
            return {"evaluations": {name: evaluation.run()}}
        with in_use(Path(config.cache), folder):
            run = Run(folder, "eval", config_yaml, names)
            try:
                entry = evaluation.run()
                shutil.copytree(videos, folder / "evaluations" / name, copy_function=link_or_copy)
                full = run.finish(
                    _head(config, sides[0], entry, names, card, needed), lambda done: write_report(folder, done)
                )
            except BaseException as error:
                run.fail(error)
                raise
    print(evaluation_summary(name, entry, folder), flush=True)
    mirror(config.tracker, folder, dataclasses.asdict(config), full)
    return full


def _asked_of_model(config: EvaluateConfig) -> tuple[list[Pair], str]:
    """Where there is no run, ``prompts=own`` stands for the list it was made from."""
    prompts = settled(config.prompts)
    own = prompts.name == OWN
    texts = prompts.by_language[config.model.language] if own and not prompts.texts else prompts.texts
    asked = pairs(dataclasses.replace(prompts, texts=texts, seeds=prompts.seeds or [0]))
    return asked, "demo5" if own else prompts.name


def _head(
    config: EvaluateConfig,
    side: Side,
    entry: dict[str, Any],
    names: dict[str, Any],
    device: torch.device,
    needed: dict[str, Any],
) -> dict[str, Any]:
    blocks = len(shape_of_whole(side.source).blocks)
    return {
        "mode": "evaluate",
        "signature": signature(dataclasses.asdict(config), side.fingerprint, device),
        **names,
        "model": {
            "name": config.model.name,
            "blocks": blocks,
            "batch": side.model.batch,
            "fingerprint": side.fingerprint,
            "outliers": list(chosen_blocks(config.model.outliers, blocks)),
        },
        "generation": dataclasses.asdict(config.model.generation),
        "verdict": entry["verdict"],
        "evaluations": {entry["prompts"]: entry},
        "memory": {
            "peak_bytes": peak_memory(device),
            "begun_bytes": needed["begun"],
            "planned_bytes": needed["begun"] + needed["bytes"],
        },
        "planned": {"seconds": needed["seconds"]},
        "provenance": entry["provenance"],
    }


def _side(name: str, prefix: str, model: ModelConfig, path: str) -> Side:
    """Videos come one at a time where a batch would share a step."""
    source = find_folder(path)
    check_folder(source)
    check_guidance(source, model.generation)
    made = [described for part in transformers_of(source).values() if (described := quantization_of(part)) is not None]
    alone = any(not parse(config_of(described)).independent for described in made)
    return Side(name, prefix, source, dataclasses.replace(model, batch=1) if alone else model)


def _planned(config: EvaluateConfig, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What would be done, and nothing else."""
    cache, device = Cache(Path(config.cache)), torch.device("cpu")
    for run in runs:
        evaluation = _of_run(run, _evaluable(run), config.eval, cache, device, config.prompts, config.reference)
        _refuse_prompts(evaluation)
        lacking = sum(not evaluation.there(pair) for pair in evaluation.pairs)
        print(f"{run}: {len(evaluation.pairs)} pairs of {evaluation.name}, of which {lacking} would be generated")
        for side in evaluation.sides if lacking else ():
            if (side.source / "model_index.json").is_file():
                print_needs(plan_of(side, lacking, pick_device(config.model.device)), side.name)
    if not runs:
        asked, name = _asked_of_model(config)
        sides = [_side("model", "", config.model, config.model.path)]
        sides += [_side("bf16", "bf16.", config.model, config.reference)] if config.reference is not None else []
        _refuse_prompts(Evaluation(name, Path(), sides, [asked], config.eval, device, cache))
        videos = len(asked) * (1 if len(sides) == 1 else 2 + config.eval.noise_floor)
        print(
            f"{config.model.path} beside {config.reference or 'nothing'}: {len(asked)} pairs of {name}, {videos} videos"
        )
        sides += [_perturbed(sides[1], {})] if config.reference is not None and config.eval.noise_floor else []
        for side in sides:
            print_needs(plan_of(side, len(asked), pick_device(config.model.device)), side.name)
    lpips = perceptual.settled(config.eval.lpips)
    print(f"dimensions of VBench: {', '.join(config.eval.dimensions) or 'none'}; LPIPS {lpips}")
    return []
