"""The evaluation job: the verdict on a run, on each run of a sweep, or on a model.

Of a run, what is found joins its ``result.json``, under ``evaluations``, and its report; of a model it makes a run of
its own. Several processes that are given the same job share it through the cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate.config import EvalConfig, EvaluateConfig, check_eval
from wanquant.evaluate.evaluation import Evaluation, Side
from wanquant.evaluate.prompts import Pair, PromptsConfig, pairs
from wanquant.evaluate.sweep import jobs_of
from wanquant.evaluate.tables import report, text
from wanquant.quant.config import parse
from wanquant.runs.cache import Cache
from wanquant.runs.evaluation_report import evaluation_summary
from wanquant.runs.finished import in_use
from wanquant.runs.report import write_report
from wanquant.runs.run import Run, digest, read_config, read_result, refused_leave_no_result, signature, write_result
from wanquant.runs.tracking import check_tracker, mirror
from wanquant.wan.checkpoint import config_of, quantization_of
from wanquant.wan.config import ModelConfig
from wanquant.wan.device import forget_peak_memory, one_card, peak_memory, pick_device
from wanquant.wan.generate import GenerationConfig
from wanquant.wan.load import check_folder, empty_transformer, find_folder, hush_libraries
from wanquant.wan.outliers import OutliersConfig, chosen_blocks
from wanquant.wan.tiny import parse_caption

#: The prompts a run was made with, and the name of their evaluation.
OWN = "own"


def run_evaluate(config: EvaluateConfig, folder: Path, config_yaml: str) -> list[dict[str, Any]]:
    """Evaluates, and returns the results as written. ``ValueError`` and ``OSError`` are the user's."""
    check_tracker(config.tracker)
    check_eval(config.eval)
    if config.threads < 1:
        raise ValueError(f"threads={config.threads}: must be at least 1")
    torch.set_num_threads(config.threads)
    device = pick_device(config.model.device)
    hush_libraries()
    if config.run is None:
        return [_of_model(config, folder, config_yaml, device)] if not config.dry_run else _planned(config, [])
    where = Path(config.run)
    runs = [where] if (where / "result.json").is_file() or not _is_sweep(where) else jobs_of(where)
    if config.dry_run:
        return _planned(config, runs)
    sound, failed = _sound(runs)
    with one_card(device) as card:
        results = [
            evaluate_run(run, config.eval, Path(config.cache), card, config.prompts, config.reference) for run in sound
        ]
    for run, result in zip(sound, results, strict=True):
        mirror(config.tracker, run, dataclasses.asdict(config), result)
    if where not in runs and _writes():
        print(text(report(where), where), flush=True)
    if failed:
        raise ValueError(f"not evaluated: {'; '.join(failed)}")
    return results


def evaluate_run(
    run: Path,
    config: EvalConfig,
    cache_root: Path,
    device: torch.device,
    prompts: PromptsConfig | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """Evaluates a finished run on its own prompts or others, and joins what is found to its result and report."""
    result = _evaluable(run)
    evaluation = _of_run(run, result, config, Cache(cache_root), device, prompts, reference)
    _refuse_prompts(evaluation)
    shown = f"{evaluation.name} prompts, {len(evaluation.pairs)} pairs"
    print(f"{run}: {result['quant']['name']}, protect {result['protect']['name']}, {shown}", flush=True)
    entry = evaluation.run(config.dimensions)
    if evaluation.name == OWN:
        entry = _own(entry, result)
    if not _writes():
        return result
    with in_use(cache_root, run):
        result = read_result(run)  # another process may have joined another evaluation
        result.setdefault("evaluations", {})[evaluation.folder.name] = entry
        write_report(run, result)
        write_result(run, result)
    print(evaluation_summary(evaluation.folder.name, entry, run), flush=True)
    return result


def _writes() -> bool:
    """Of the processes of one ``accelerate launch`` the first: the others have shared the work."""
    return os.environ.get("RANK", "0") == "0"


def _is_sweep(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and path.name.isdigit() for path in folder.iterdir())


def _sound(runs: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Those that can be evaluated; a single one has to."""
    sound, failed = [], []
    for run in runs:
        try:
            _evaluable(run)
            sound.append(run)
        except ValueError as error:
            if len(runs) == 1:
                raise
            failed.append(str(error))
    return sound, failed


def _evaluable(run: Path) -> dict[str, Any]:
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
    asked = own if prompts is None or prompts.name == OWN else pairs(_in_language(prompts, model.language))
    official = prompts is not None and prompts.official
    name = OWN if asked == own else prompts.name if prompts is not None else OWN
    key = _key(name, asked, result)
    files = {side: _files(run, side, own) for side in ("quantized", "bf16", "bf16_ulp")}
    made_from = find_folder(reference or model.path, shapes_only=True)
    plain = dataclasses.replace(model, outliers=OutliersConfig())
    quantized = run / "checkpoint" if result["conversion"]["converted"] else made_from
    sides = [
        Side("quantized", "", quantized, plain if result["conversion"]["converted"] else model, files["quantized"]),
        Side("bf16", "bf16.", made_from, model, files["bf16"], result["model"]["fingerprint"]),
    ]
    ours = [pair for pair in own if pair in set(asked)]
    new = [pair for pair in asked if pair not in set(own)]
    known = {pair: value for pair, value in _measured(result, own).items() if pair in set(asked)}
    lists = [pairs_ for pairs_ in (ours, new) if pairs_]
    moved = {pair: path for pair, path in files["bf16_ulp"].items() if pair in set(asked)}
    extra = {"floor_ulp.": moved} if config.noise_floor and moved else {}
    where = run / "evaluations" / key
    evaluation = Evaluation(name, where, sides, lists, config, device, cache, official, known, extra)
    if not quantized.is_dir() and any(not evaluation.there(pair) for pair in evaluation.pairs):
        raise ValueError(f"{run} has no checkpoint to generate from: run ptq.py with checkpoint=true")
    return evaluation


def _key(name: str, asked: list[Pair], result: dict[str, Any]) -> str:
    """Other pairs under the same name get another one."""
    there = result.get("evaluations", {}).get(name)
    return name if there is None or there["prompt_hash"] == digest(asked) else f"{name}-{digest(asked)[:8]}"


def _files(run: Path, side: str, own: Sequence[Pair]) -> dict[Pair, Path]:
    paths = {pair: run / "videos" / side / f"{place:03d}-seed{pair[1]}.mp4" for place, pair in enumerate(own)}
    return {pair: path for pair, path in paths.items() if path.is_file()}


def _measured(result: dict[str, Any], own: Sequence[Pair]) -> dict[Pair, dict[str, dict[str, float]]]:
    """What the run itself has measured of its pairs, and an earlier evaluation of them; a null is a NaN."""
    metrics = {**result.get("evaluations", {}).get(OWN, {}).get("metrics", {}), **result["metrics"]}
    found: dict[Pair, dict[str, dict[str, float]]] = {pair: {"metrics": {}, "figures": {}} for pair in own}
    for name, metric in metrics.items():
        if not name.startswith(("floor_", "difference.")) and "vbench." not in name:
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
    return {**entry, "metrics": metrics, "gates": {}, "verdict": result["verdict"]}


def _model_of(run: Path, result: dict[str, Any]) -> ModelConfig:
    """As the run asked it, in the batches it was asked in."""
    raw = read_config(run)["model"]
    nested = {"generation": GenerationConfig(**raw["generation"]), "outliers": OutliersConfig(**raw["outliers"])}
    return ModelConfig(**{**raw, **nested, "batch": result["model"]["batch"]})


def _in_language(prompts: PromptsConfig, language: str) -> PromptsConfig:
    """A preset's texts are those of the model evaluated, which need not be the one the config was composed for."""
    if prompts.texts in prompts.by_language.values():
        return dataclasses.replace(prompts, texts=prompts.by_language.get(language, prompts.texts))
    return prompts


def _refuse_prompts(evaluation: Evaluation) -> None:
    if evaluation.scenes:
        for prompt, _ in evaluation.pairs:
            parse_caption(prompt)


def _of_model(config: EvaluateConfig, folder: Path, config_yaml: str, device: torch.device) -> dict[str, Any]:
    with refused_leave_no_result(folder):
        sides = [_side("model", "", config.model, config.model.path)]
        if config.reference is not None:
            model = dataclasses.replace(config.model, batch=sides[0].model.batch)
            sides.append(_side("bf16", "bf16.", model, config.reference))
        asked = pairs(config.prompts)
    names = {"model": {"name": config.model.name}, "quant": {"name": "as it is"}, "protect": {"name": "as it is"}}
    with in_use(Path(config.cache), folder), one_card(device) as card, refused_leave_no_result(folder):
        key = config.prompts.name if config.prompts.name != OWN else "demo5"
        where = folder / "evaluations" / key
        evaluation = Evaluation(
            key, where, sides, [asked], config.eval, card, Cache(Path(config.cache)), config.prompts.official
        )
        _refuse_prompts(evaluation)
        run = Run(folder, "eval", config_yaml, names)
        forget_peak_memory(card)
        try:
            entry = evaluation.run(config.eval.dimensions)
            full = run.finish(_head(config, sides[0], entry, names, card), lambda done: write_report(folder, done))
        except BaseException as error:
            run.fail(error)
            raise
    mirror(config.tracker, folder, dataclasses.asdict(config), full)
    print(evaluation_summary(key, entry, folder), flush=True)
    return full


def _head(
    config: EvaluateConfig, side: Side, entry: dict[str, Any], names: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    blocks = len(empty_transformer(side.source).blocks)
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
        "memory": {"peak_bytes": peak_memory(device)},
        "provenance": entry["provenance"],
    }


def _side(name: str, prefix: str, model: ModelConfig, path: str) -> Side:
    """Videos come one at a time where a batch would share a step."""
    source = find_folder(path)
    check_folder(source)
    described = quantization_of(source / "transformer")
    alone = described is not None and not parse(config_of(described)).independent
    return Side(name, prefix, source, dataclasses.replace(model, batch=1) if alone else model)


def _planned(config: EvaluateConfig, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What would be done, and nothing else."""
    for run in runs:
        result = _evaluable(run)
        evaluation = _of_run(
            run, result, config.eval, Cache(Path(config.cache)), torch.device("cpu"), config.prompts, config.reference
        )
        lacking = sum(not evaluation.there(pair) for pair in evaluation.pairs)
        print(f"{run}: {len(evaluation.pairs)} pairs of {evaluation.name}, of which {lacking} would be generated")
    if not runs:
        print(f"{config.model.path}: {len(pairs(config.prompts))} pairs of {config.prompts.name} would be generated")
    print(f"dimensions of VBench: {', '.join(config.eval.dimensions) or 'none'}")
    return []
