"""What a run of PTQ leaves: the parts of its ``result.json``, and its videos."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanquant.ptq.calibrate import Calibration
from wanquant.ptq.choose import Choice
from wanquant.ptq.plan import PTQPlan
from wanquant.quant import ConversionReport
from wanquant.quant.statistics import RESIDUAL
from wanquant.runs import pictures
from wanquant.runs.progress import progress
from wanquant.wan.generate import Sample

#: Videos on the contact sheet at most.
SHEET_ROWS = 12


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
        },
        "quant": dataclasses.asdict(config.quant),
    }


def conversion(
    plan: PTQPlan, report: ConversionReport, calibration: Calibration, choice: Choice, overflows: Counter[str]
) -> dict[str, Any]:
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
        "attention": {
            **report.attention_counts(),
            "modules": [dataclasses.asdict(module) for module in report.attentions],
        },
        "overflow": {"elements": sum(overflows.values()), "modules": dict(sorted(overflows.items()))},
        "modules": [dataclasses.asdict(module) for module in report.modules],
        "calibration": {
            "videos": len(statistics.layout.videos),
            "steps": statistics.layout.steps,
            "coverage": statistics.coverage(),
            "block_absmax": [statistics.site(f"blocks.{i}", RESIDUAL).largest() for i in range(report.blocks)],
            "input_absmax": statistics.input_absmax(),
        },
    }


def write_videos(
    folder: Path,
    format_: str,
    fps: int,
    baseline: Sequence[Sample],
    samples: Sequence[Sample],
    perturbed: Sequence[Sample],
) -> None:
    """Of each pair BF16, quantized, both side by side, and BF16 with its noise ``perturbed``, if that was made; and the
    contact sheet."""
    rows = []
    with progress("write videos", len(samples), "pair") as tick:
        for number, (a, b) in enumerate(zip(baseline, samples, strict=True)):
            frames = pictures.to_uint8(a.video), pictures.to_uint8(b.video)
            shown = {"bf16": frames[0], "quantized": frames[1]}
            shown["side_by_side"] = pictures.side_by_side(frames, ("BF16", format_))
            if perturbed:
                shown["bf16_ulp"] = pictures.to_uint8(perturbed[number].video)
            for side, video in shown.items():
                pictures.write_mp4(folder / "videos" / side / f"{number:03d}-seed{a.seed}.mp4", video, fps)
            rows.append((f"{a.prompt}, seed {a.seed}", (("BF16", frames[0]), (format_, frames[1]))))
            tick()
    pictures.write_png(folder / "figures" / "contact_sheet.png", pictures.contact_sheet(rows[:SHEET_ROWS]))
