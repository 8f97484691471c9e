"""What a run of PTQ leaves: the parts of its ``result.json``, and its videos."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wanquant.evaluate.gates import GateResult
from wanquant.evaluate.stats import ENOUGH_PAIRS, Item, estimate
from wanquant.kernels.products import multiplies_bf16
from wanquant.ptq.calibrator import Calibration
from wanquant.ptq.config import PTQConfig
from wanquant.ptq.generating import Couples
from wanquant.ptq.plan import PTQPlan
from wanquant.ptq.protect import Choice
from wanquant.quant import ConversionReport
from wanquant.quant.eight_bit import CARRIED, emulates
from wanquant.quant.scheme import Scheme
from wanquant.quant.statistics import RESIDUAL
from wanquant.runs import pictures
from wanquant.runs.files import write_atomic
from wanquant.runs.progress import progress
from wanquant.runs.run import digest, read_result
from wanquant.wan.cached import Pair
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import ModelConfig
from wanquant.wan.generate import Sample
from wanquant.wan.lora import describe_loras

#: Of the config of the evaluation, what figures are taken by.
MEASURED_BY = ("videos", "single_steps", "flow", "lpips")
#: Videos on the contact sheet at most.
SHEET_ROWS = 12


def names_of(config: PTQConfig) -> dict[str, dict[str, Any]]:
    """Of the model, the quantization and the protection, in the form of the result."""
    return {group: {"name": getattr(config, group).name} for group in ("model", "quant", "protect")}


def head(plan: PTQPlan, fingerprint: str) -> dict[str, Any]:
    """What was asked of which model."""
    config, model = plan.config, plan.model
    return {
        "mode": config.mode,
        "model": {
            "name": config.model.name,
            "blocks": model.blocks,
            "batch": config.model.batch,
            "parameters": sum(p.numel() for p in model.shape.parameters()),
            "fingerprint": fingerprint,
            "outliers": list(model.outliers),
            "octaves": config.model.outliers.octaves,
            "source": model.files.told,
            "lora": describe_loras(config.model),
        },
        "pictures": {text: {"path": str(each.path), "sha256": each.sha256} for text, each in plan.pictures.items()},
        "quant": dataclasses.asdict(config.quant),
        "eval": {**{name: getattr(config.eval, name) for name in MEASURED_BY}, "frames": config.model.other_frames},
    }


def conversion(plan: PTQPlan, report: ConversionReport, calibration: Calibration, choice: Choice) -> dict[str, Any]:
    """What was quantized, why the rest was not, and what calibration saw."""
    statistics, protect = calibration.statistics, plan.config.protect
    return {
        "protect": {
            "name": protect.name,
            "blocks": list(report.protected_blocks),
            "modules": list(protect.modules),
            "chosen": choice.as_json(),
            "fraction_of_flops_quantized": calibration.fraction_of_flops(report),
        },
        "conversion": report.counts(),
        "bits_per_weight": bits_per_weight(plan, report),
        "attention": {
            **report.attention_counts(),
            "modules": [dataclasses.asdict(module) for module in report.attentions],
        },
        "modules": [dataclasses.asdict(module) for module in report.modules],
        "calibration": {
            "videos": len(statistics.layout.videos),
            "steps": statistics.layout.steps,
            "coverage": statistics.coverage(),
            "block_absmax": [statistics.site(f"blocks.{i}", RESIDUAL).largest() for i in range(report.blocks)],
            "input_absmax": statistics.input_absmax(),
        },
    }


def bits_per_weight(plan: PTQPlan, report: ConversionReport) -> float | None:
    """Of what is quantized, as checkpoints hold it: codes, scales and what lies beside them. None for nothing."""
    linears = [plan.model.shape.get_submodule(name) for name in report.names("converted")]
    sizes = [(plan.scheme.packed_bytes(each), each.weight.numel()) for each in linears if isinstance(each, nn.Linear)]
    stored, weights = map(sum, zip(*sizes, strict=True)) if sizes else (0, 0)
    return 8 * stored / weights if weights else None


def of_kind(counts: Counter[str], kind: str) -> dict[str, int]:
    """What quantized linears counted of one kind, by their names."""
    return {name.removeprefix(f"{kind} "): count for name, count in counts.items() if name.startswith(f"{kind} ")}


def overflowed_weights(transformer: nn.Module) -> dict[str, int]:
    """How many elements of each weight fell beyond the format's range, as it was quantized: a checkpoint no longer
    knows."""
    counts = {name: int(layer.overflowed_weight) for name, layer in quantized_linears(transformer).items()}
    return {name: count for name, count in counts.items() if count}


def overflow(counts: Counter[str], weights: Mapping[str, int]) -> dict[str, Any]:
    """How many elements of inputs and of ``weights`` fell beyond the format's range, and in which linears."""
    sides = {"inputs": of_kind(counts, "overflow"), "weights": weights}
    return {side: {"elements": sum(of.values()), "modules": dict(sorted(of.items()))} for side, of in sides.items()}


def lost_to_fp8(scheme: Scheme, transformer: nn.Module, counts: Counter[str]) -> dict[str, Any]:
    """Where values are carried by E4M3: how many of inputs and weights it does not hold."""
    if scheme.product != "fp8" or scheme.format.name not in CARRIED:
        return {}
    layers = quantized_linears(transformer).values()
    inputs, coded = (sum(of_kind(counts, kind).values()) for kind in ("lost", "coded"))
    weights, all_weights = sum(layer.lost_weights() for layer in layers), sum(layer.weight.numel() for layer in layers)
    shares = {"inputs_share": inputs / max(1, coded), "weights_share": weights / max(1, all_weights)}
    return {"lost_to_fp8": {"inputs": inputs, "weights": weights, **shares}}


def tail(
    plan: PTQPlan, pairs: Sequence[Pair], memory: tuple[int, int], planned: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    """How it was made, by ``pairs``. ``memory``: bytes before the model was loaded, and at most; ``planned``: bytes and
    seconds that were predicted."""
    texts, seeds = (list(dict.fromkeys(values)) for values in zip(*pairs, strict=True))
    begun, peak = memory
    return {
        "generation": dataclasses.asdict(plan.settings),
        "memory": {"peak_bytes": peak, "begun_bytes": begun, "planned_bytes": begun + planned["bytes"]},
        "planned": {name: planned[name] for name in ("seconds", "stages", "guess")},
        "provenance": {
            **made,
            "bf16_products": "native" if multiplies_bf16(plan.device) else "float32, rounded once",
            **(
                {f"{plan.scheme.product}_products": "in BF16, of the same codes"}
                if emulates(plan.scheme, plan.device)
                else {}
            ),
            "seeds": seeds,
            "prompts": texts,
            "prompt_hash": digest(texts),
        },
    }


def evaluations_in(folder: Path, asked: str) -> dict[str, Any]:
    """Of an earlier result in the folder that has the same signature: what ``eval.py`` has joined to it."""
    try:
        result = read_result(folder)
    except (ValueError, OSError):
        return {}
    found: dict[str, Any] = result.get("evaluations", {}) if result.get("asked") == asked else {}
    return found


def verdict(metrics: Mapping[str, Sequence[Item]], gate_results: Sequence[GateResult], pairs: int) -> dict[str, Any]:
    """The metrics with their intervals, the gates, and whether all are passed, which is unknown of no videos."""
    return {
        "metrics": {name: estimate(items).as_json() for name, items in metrics.items()},
        "demonstration": pairs < ENOUGH_PAIRS,
        "verdict": ("pass" if all(gate.passed for gate in gate_results) else "fail") if gate_results else "no videos",
        "gates": {gate.name: gate.as_json() for gate in gate_results},
    }


def write_readme(checkpoint: Path, model: ModelConfig) -> None:
    """Into a checkpoint, where LoRAs were beside what it holds: which, and how they are loaded on it."""
    if model.lora_fuse or not model.lora:
        return
    loras = describe_loras(model)
    which = [f"{lora['transformer']}=" if lora["transformer"] else "./" for lora in loras]
    given = [f"{place}{lora['file']}:{lora['scale']}" for place, lora in zip(which, loras, strict=True)]
    sums = "\n".join(f"- {lora['file']}, SHA-256 {lora['sha256']}" for lora in loras)
    text = f"""The weights alone are quantized here. They were calibrated and measured with LoRA files beside them in
BF16, which this folder does not hold:

{sums}

```python
import wanquant
from wanquant.wan.lora import load_loras

pipe = wanquant.load_pipeline("<this folder>")
load_loras(pipe, {json.dumps(given)})
```
"""
    write_atomic(checkpoint / "README.md", text)


def write_videos(
    folder: Path, plan: PTQPlan, baseline: Sequence[Sample], samples: Sequence[Sample], floors: Couples
) -> None:
    """Of each pair BF16, quantized, both side by side, and BF16 with its noise perturbed, if that was made; and the
    contact sheet."""
    if not samples:
        return
    format_, fps, perturbed = plan.config.quant.format, plan.settings.fps, floors.get("floor_ulp.", ())
    rows = []
    with progress("write videos", len(samples), "pair") as tick:
        for number, (a, b) in enumerate(zip(baseline, samples, strict=True)):
            frames = pictures.to_uint8(a.video), pictures.to_uint8(b.video)
            shown = {"bf16": frames[0], "quantized": frames[1]}
            shown["side_by_side"] = pictures.side_by_side(frames, ("BF16", format_))
            if perturbed:
                shown["bf16_ulp"] = pictures.to_uint8(perturbed[number][1].video)
            for side, video in shown.items():
                pictures.write_mp4(folder / "videos" / side / f"{number:03d}-seed{a.seed}.mp4", video, fps)
            rows.append((f"{a.prompt}, seed {a.seed}", (("BF16", frames[0]), (format_, frames[1]))))
            tick()
    pictures.write_png(folder / "figures" / "contact_sheet.png", pictures.contact_sheet(rows[:SHEET_ROWS]))
