"""An evaluation's config, resolved once: what is judged and beside what, of which pairs, and which videos are there.

Whatever the config, the runs' results and the models' JSON files can refuse is refused here, before a weight is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanquant.evaluate.config import EvalConfig, EvaluateConfig
from wanquant.evaluate.evaluation import EvaluationPlan, Side, Values
from wanquant.evaluate.judges import flow, perceptual, vbench
from wanquant.evaluate.prompts import OWN, PromptsConfig, check_captions, is_picture, pairs, pictures, settled
from wanquant.evaluate.sweep.summary import jobs_of
from wanquant.quant.scheme import parse
from wanquant.runs.run import digest, read_config, read_result
from wanquant.runs.signature import provenance
from wanquant.wan.cached import Pair
from wanquant.wan.checkpoints.checkpoint import config_of
from wanquant.wan.checkpoints.find import check_folder, check_shape, find_model
from wanquant.wan.checkpoints.model_files import ModelFiles, lone_transformers
from wanquant.wan.config import GenerationConfig, ModelConfig, OutliersConfig, Picture
from wanquant.wan.experts import shape_of_whole
from wanquant.wan.generate import check_generation
from wanquant.wan.lora import check_loras

#: What of a run's provenance has to be as it is now for its figures to stand beside new ones.
SAME = ("packages", "device", "device_name", "threads", "instructions")


@dataclass(frozen=True, kw_only=True)
class RunPlan(EvaluationPlan):
    """Of a finished ``run``, whose ``result`` the evaluation joins."""

    run: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class EvaluatePlan:
    """A ``model`` as it is, or ``runs`` by their folders: a single one, or all of a ``sweep``, where one that cannot be
    evaluated has the error that says why."""

    config: EvaluateConfig
    device: torch.device
    model: EvaluationPlan | None = None
    runs: dict[Path, RunPlan | ValueError | OSError] = field(default_factory=dict)
    sweep: Path | None = None


def resolve_evaluate(config: EvaluateConfig, device: torch.device) -> EvaluatePlan:
    """``device`` is that it will run on. ``ValueError`` and ``OSError`` name what is wrong; what is wrong with a run of
    a sweep is in its entry."""
    config.check()
    check_eval(config.eval)
    if config.run is None:
        return EvaluatePlan(config, device, _resolve_model(config))
    where = Path(config.run)
    asked = (config.eval, device, config.threads, config.prompts, config.reference, config.verify)
    if (where / "result.json").is_file() or not _is_sweep(where):
        return EvaluatePlan(config, device, runs={where: resolve_run(where, *asked)})
    runs: dict[Path, RunPlan | ValueError | OSError] = {}
    for run in jobs_of(where):
        try:
            runs[run] = resolve_run(run, *asked)
        except (ValueError, OSError) as error:
            runs[run] = error
    return EvaluatePlan(config, device, runs=runs, sweep=where)


def check_eval(config: EvalConfig) -> None:
    """Refuses what can be refused before a model is read: dimensions, packages, weights."""
    vbench.check_dimensions(config.dimensions)
    perceptual.settled(config.lpips)
    flow.settled(config.flow)
    vbench.prepare(config.dimensions, config.foreign_weights)


def _is_sweep(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and path.name.isdigit() for path in folder.iterdir())


def _resolve_model(config: EvaluateConfig) -> EvaluationPlan:
    name = "demo5" if config.prompts.name == OWN else config.prompts.name
    sides = [_side("model", "", config.model, find_model(config.model.path, config.model.base), config.verify)]
    if config.reference is not None:
        model = dataclasses.replace(config.model, batch=sides[0].model.batch)
        sides.append(_side("bf16", "bf16.", model, _reference(config.reference, model), config.verify))
        sides += [sides[1].perturbed({})] if config.eval.noise_floor else []
    family = check_shape(sides[0].source)
    found = pictures(config.prompts_of_model(), family.takes_pictures, needed=family.needs_pictures)
    sides = [dataclasses.replace(side, pictures=found) for side in sides]
    return EvaluationPlan(name, Path(), tuple(sides), (config.pairs_of_model(),), config.eval, config.prompts.official)


def _reference(reference: str, model: ModelConfig, shapes_only: bool = False) -> ModelFiles:
    """With the model's base, where the reference is a transformer alone."""
    base = model.base if lone_transformers(Path(reference)) else ""
    return find_model(reference, base, shapes_only)


def _side(name: str, prefix: str, model: ModelConfig, source: ModelFiles, verify: bool) -> Side:
    """Videos come one at a time where a batch would share a scale, or a picture."""
    family = check_folder(source)
    check_generation(source, model.generation)
    made = [part.quantization for part in source.transformers.values() if part.quantization is not None]
    check_loras(model, shape_of_whole(source), quantized=bool(made))
    alone = family.takes_pictures or any(not parse(config_of(described)).independent for described in made)
    return Side(name, prefix, source, dataclasses.replace(model, batch=1) if alone else model, verify=verify)


def resolve_run(
    run: Path,
    config: EvalConfig,
    device: torch.device,
    threads: int,
    prompts: PromptsConfig | None = None,
    reference: str | None = None,
    verify: bool = True,
) -> RunPlan:
    """A finished run on ``prompts``, or its own. ``reference`` is where the run's model is, if not where it was."""
    result = _finished(run)
    model = _model_of(run, result)
    if "psnr" not in result["metrics"]:
        raise ValueError(f"{run} made no videos (eval.videos=false): there is nothing to judge")
    own = [(item["prompt"], item["seed"]) for item in result["metrics"]["psnr"]["per_item"]]
    asked, name = _asked(prompts, own, model.language)
    new = [pair for pair in asked if pair not in set(own)]
    # What the run has measured elsewhere, or by other libraries, does not stand beside what is measured now.
    ours = [pair for pair in own if pair in set(asked)]
    if new and not (_is_alike(result, device, threads) and result["eval"]["flow"] == flow.settled(config.flow)):
        ours = []
    new = [pair for pair in asked if pair not in set(ours)]
    found = _pictures_of(result, prompts, asked, {text for text, _ in new})
    sides = _sides_of(run, result, model, reference, {pair: own.index(pair) for pair in ours}, found)
    sides = tuple(dataclasses.replace(side, verify=verify) for side in sides)
    if not config.noise_floor or len(sides[2].files) < len(ours):
        sides = sides[:2]
    check_captions((text for text, _ in asked), model.language)
    there = result.get("evaluations", {}).get(name)
    by = digest(sorted(asked))
    key = name if there is None or there["prompt_hash"] == by else f"{name}-{by[:8]}"
    measured = _measured(result, own)
    return RunPlan(
        name=name,
        folder=run / "evaluations" / key,
        sides=sides,
        lists=tuple(pairs_ for pairs_ in (ours, new) if pairs_),
        config=config,
        official=prompts is not None and prompts.official,
        # A flow that is asked for by name is taken.
        known={pair: measured[pair] for pair in ours if config.flow in ("auto", result["eval"]["flow"])},
        run=run,
        result=result,
    )


def _pictures_of(
    result: dict[str, Any], prompts: PromptsConfig | None, asked: Sequence[Pair], new: Collection[str]
) -> dict[str, Picture]:
    """By text: the run's own, which have to be what they were where ``new`` videos start from them, and those that
    ``prompts`` has for further texts."""
    own = {text: Picture(Path(each["path"]), each["sha256"]) for text, each in result.get("pictures", {}).items()}
    texts = list(dict.fromkeys(text for text, _ in asked))
    found = {text: own[text] for text in texts if text in own}
    if prompts is not None and prompts.images:
        if not own:
            raise ValueError("prompts.images: this run's videos were made from text alone, leave the pictures out")
        found = pictures(dataclasses.replace(prompts, texts=texts, file="", official=False), True)
    elif own and len(found) < len(texts):
        raise ValueError(f"prompts.images: give the first frame of each of the {len(texts)} texts, in their order")
    for text, picture in found.items():
        if picture.sha256 != own.get(text, picture).sha256 or (text in new and not is_picture(picture)):
            raise ValueError(f"{picture.path} is not the picture that this run's video of {text!r} was made from")
    return found


def _finished(run: Path) -> dict[str, Any]:
    """The run's result, if it can be evaluated."""
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    result = read_result(run)
    if result["status"] != "ok":
        raise ValueError(f"{run} failed ({result['error']}): there is nothing to evaluate")
    if result.get("mode") != "quantize":
        raise ValueError(f"{run} is no quantization: give a run or a sweep of ptq.py")
    return result


def _is_alike(result: dict[str, Any], device: torch.device, threads: int) -> bool:
    """Whether the run was made as videos would be made now."""
    now = {**provenance(device), "threads": threads}
    return all(result["provenance"].get(key) == now[key] for key in SAME)


def _model_of(run: Path, result: dict[str, Any]) -> ModelConfig:
    """As the run asked it, in the batches it was asked in."""
    raw = read_config(run)["model"]
    nested = {"generation": GenerationConfig(**raw["generation"]), "outliers": OutliersConfig(**raw["outliers"])}
    return ModelConfig(**{**raw, **nested, "batch": result["model"]["batch"]})


def _asked(prompts: PromptsConfig | None, own: list[Pair], language: str) -> tuple[list[Pair], str]:
    """The pairs, in the language of the model, and their name: ``own`` are those of the run, the texts and seeds of
    which ``prompts=own`` stands for, where it is not given others."""
    if prompts is None:
        return own, OWN
    prompts = settled(prompts)
    texts = prompts.texts
    if texts in prompts.by_language.values():
        texts = prompts.by_language.get(language, texts)
    if prompts.name == OWN and not texts:
        texts = list(dict.fromkeys(text for text, _ in own))
    seeds = prompts.seeds or list(dict.fromkeys(seed for _, seed in own))
    asked = pairs(dataclasses.replace(prompts, texts=texts, seeds=seeds))
    if asked == own:
        return asked, OWN
    return asked, f"{OWN}-{digest(sorted(asked))[:8]}" if prompts.name == OWN else prompts.name


def _sides_of(
    run: Path,
    result: dict[str, Any],
    model: ModelConfig,
    reference: str | None,
    places: dict[Pair, int],
    shown: dict[str, Picture],
) -> tuple[Side, ...]:
    """Quantized, BF16, and that with its noise perturbed, with the run's own videos of the pairs in ``places``."""
    files = {}
    for side in ("quantized", "bf16", "bf16_ulp"):
        paths = {pair: run / "videos" / side / f"{place:03d}-seed{pair[1]}.mp4" for pair, place in places.items()}
        files[side] = {pair: path for pair, path in paths.items() if path.is_file()}
    made_from = _reference(reference or model.path, model, shapes_only=True)
    bf16 = Side("bf16", "bf16.", made_from, model, files["bf16"], result["model"]["fingerprint"], pictures=shown)
    quantized = dataclasses.replace(bf16, name="quantized", prefix="", files=files["quantized"])
    if result["conversion"]["converted"]:
        lora = [] if model.lora_fuse else model.lora  # the checkpoint's weights have what was fused, and the outliers
        plain = dataclasses.replace(model, outliers=OutliersConfig(), lora=lora)
        made = ModelFiles.of(run / "checkpoint")
        quantized = dataclasses.replace(quantized, source=made, model=plain, fingerprint="")
    return quantized, bf16, bf16.perturbed(files["bf16_ulp"])


def _measured(result: dict[str, Any], own: Sequence[Pair]) -> dict[Pair, Values]:
    """What the run itself has measured of its pairs, and an earlier evaluation of them; a null is a NaN."""
    metrics = {**result.get("evaluations", {}).get(OWN, {}).get("metrics", {}), **result["metrics"]}
    found: dict[Pair, Values] = {pair: {"metrics": {}, "figures": {}} for pair in own}
    for name, metric in metrics.items():
        if not name.startswith(("floor_seed.", "difference.")) and "vbench." not in name:
            for item in metric["per_item"]:
                value = item["value"]
                found[item["prompt"], item["seed"]]["metrics"][name] = math.nan if value is None else value
    for name, gate in result["gates"].items():
        for pair, figure in zip(own, gate["per_item"], strict=True):
            found[pair]["figures"][name] = math.nan if figure is None else figure
    return found
