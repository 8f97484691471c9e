"""What the activations look like, block by block: ``python ptq.py mode=analyze``.

Everything is read from the statistics of one BF16 pass, but for two measures of what quantization does to a block,
which ``wanquant.ptq.sensitivity`` takes. Tables are rows of plain values: they go into ``result.json`` and, with the
figures drawn from them, as CSV into ``analysis/``.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanquant.evaluate.stats import ENOUGH_PAIRS, Estimate, rank_correlation
from wanquant.kernels.statistics import DYNAMIC_RULES
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.plan import PTQPlan
from wanquant.ptq.protect import choose
from wanquant.ptq.sensitivity import kinds
from wanquant.quant.scale import parse_rule, static_scale
from wanquant.quant.select import resolve_blocks
from wanquant.quant.site import View
from wanquant.quant.statistics import INPUT, RESIDUAL, Site, Statistics
from wanquant.runs.files import replacing, write_atomic
from wanquant.runs.reports.table import csv_text

#: One scale for all that passes, chosen in calibration: their SQNR is worked out from the histogram.
STATIC_RULES = ("direct", "amax/15", "amax/8", "amax/16", "pow2/15", "p99.9/15", "p99.99/15", "ema/15", "mse", "ofmr")
PER_TOKEN = DYNAMIC_RULES[0].name
#: A block stands out where it is so many robust standard deviations (1.4826 · median absolute deviation) off.
STANDS_OUT = 3.5
#: Columns of the table of blocks, what they are, and whether blocks are compared by their logarithm.
MEASURES = (
    ("residual_absmax", "largest magnitude of the residual stream behind it", True),
    ("input_absmax", "largest magnitude that enters one of its linears", True),
    ("kurtosis", "largest kurtosis of what enters one of its linears", True),
    ("few_bits", "share of what enters its linears that has fewer than 3 mantissa bits", False),
    ("input_sqnr", "least SQNR of rounding what enters one of its linears, dB", False),
    ("block_sqnr", "SQNR of its output when it alone is quantized, dB", False),
    ("sensitivity", "SQNR of single steps when it alone is quantized, dB", False),
)


def analyze(plan: PTQPlan, calibrator: Calibrator) -> dict[str, Any]:
    """The analysis part of ``result.json``."""
    config, protect = plan.config.analysis, plan.config.protect
    calibration, every = calibrator.calibration(full=True), range(calibrator.blocks)
    statistics = calibration.statistics
    modules = [module_row(name, statistics, calibrator) for name in calibration.flops]
    blocks = [block_row(index, statistics, modules) for index in every]
    for row, found in zip(blocks, calibrator.block_errors(), strict=True):
        row |= _with_interval("block_sqnr", found)
    kind_rows = _sensitivities(calibrator, blocks) if config.sensitivity else []
    choice = choose(protect, plan.model.protected, calibrator)
    inputs = [[f"{name}:{INPUT}" for name in statistics.block_inputs(i)] for i in every]
    analysis = {
        "statistic": config.statistic,
        "blocks": blocks,
        "modules": modules,
        "kinds": kind_rows,
        "heatmaps": {
            "stream": heatmap(statistics, [[f"blocks.{i}:{RESIDUAL}"] for i in every], config.statistic),
            "inputs": heatmap(statistics, inputs, config.statistic),
        },
        "zones": [zone_shares(index, statistics) for index in every],
        "stand_out": stand_out(blocks),
        "correlation": correlations(blocks) if config.sensitivity else [],
    }
    return {
        "protect": {"name": protect.name, "blocks": list(resolve_blocks(choice.blocks, calibrator.blocks))},
        "calibration": {"coverage": statistics.coverage(), "pairs": len(calibrator.pairs)},
        "demonstration": len(calibrator.pairs) < ENOUGH_PAIRS,
        "analysis": analysis,
    }


def _sensitivities(calibrator: Calibrator, blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds each block's sensitivity to its row; rows of the kinds of linears."""
    inner = kinds(calibrator.pipeline.transformer, calibrator.modules)
    units = [f"block {row['block']}" for row in blocks] + [f"kind {kind}" for kind in inner]
    errors = calibrator.unit_errors(units)
    for row in blocks:
        row |= _with_interval("sensitivity", errors[f"block {row['block']}"])
    return [{"kind": kind, **_with_interval("sensitivity", errors[f"kind {kind}"])} for kind in inner]


def write_analysis(analysis: dict[str, Any], calibrator: Calibrator, folder: Path) -> None:
    """Its tables as CSV, and the statistics."""
    for path in calibrator.statistics_files(full=True):
        with replacing(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    tables = {"blocks": analysis["blocks"], "kinds": analysis["kinds"], "zones": _numbered("zone", analysis["zones"])}
    tables["modules"] = [_flat(row) for row in analysis["modules"]]
    tables |= {f"heatmap_{name}": _numbered("step", rows) for name, rows in analysis["heatmaps"].items()}
    for name, table in tables.items():
        if table:
            write_atomic(folder / f"{name}.csv", csv_text(table))


def _numbered(column: str, rows: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A row a block, its values in numbered columns."""
    return [{"block": i, **{f"{column} {n}": value for n, value in enumerate(row)}} for i, row in enumerate(rows)]


def _with_interval(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def zone_shares(index: int, statistics: Statistics) -> list[float]:
    """Of all elements that enter linears of a block, the share in each zone."""
    views = [site.view() for site in statistics.block_inputs(index).values()]
    counted = np.sum([view.zones for view in views], axis=0)
    return [float(count) for count in counted / sum(view.elements for view in views)]


def module_row(name: str, statistics: Statistics, calibrator: Calibrator) -> dict[str, Any]:
    """Figures of what enters a linear: over all steps and branches."""
    site = statistics.site(name, INPUT)
    view = site.view()
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return {
        "name": name,
        "block": int(found[1]) if found else None,
        "kind": found[2] if found else name,
        "tokens": int(site.rows.sum()),
        "absmax": view.absmax,
        "mean": view.mean,
        "std": view.std,
        "kurtosis": view.kurtosis,
        "p99": view.quantile(0.99),
        "p99.9": view.quantile(0.999),
        "p99.99": view.quantile(0.9999),
        "outlier_channels": view.outliers().tolist(),
        "zones": view.shares().tolist(),
        "zones_direct": view.shares(1.0).tolist(),
        "sqnr": {rule.name: view.sqnr(rule.name) for rule in DYNAMIC_RULES} | static_sqnrs(site, view, calibrator),
        "output_absmax": statistics.site(name, "output").largest(),
        "output_kurtosis": statistics.site(name, "output").view().kurtosis,
    }


def static_sqnrs(site: Site, view: View, calibrator: Calibrator) -> dict[str, float]:
    """Of one scale for everything, by each rule."""
    scheme, found = calibrator.scheme, dict[str, float]()
    if scheme.act_format.block or scheme.act_format.keeps_all:
        return found
    for text in STATIC_RULES:
        rule = parse_rule(text, scheme.act_format)
        scale = float(static_scale(rule, site, scheme.act_format, scheme.act_overflow))
        found[f"static {text}"] = view.static_sqnr(scale, scheme.act_format, scheme.act_overflow)
    return found


def block_row(index: int, statistics: Statistics, modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = statistics.own_inputs(index)
    inside = [row for row in modules if row["name"] in own]
    # numpy's extremes keep a NaN, which Python's may lose.
    return {
        "block": index,
        "residual_absmax": statistics.site(f"blocks.{index}", RESIDUAL).largest(),
        "input_absmax": float(np.max([row["absmax"] for row in inside])),
        "kurtosis": float(np.max([row["kurtosis"] for row in inside])),
        "few_bits": 1 - zone_shares(index, statistics)[4],
        "input_sqnr": float(np.min([row["sqnr"][PER_TOKEN] for row in inside])),
    }


def heatmap(statistics: Statistics, sites: Sequence[Sequence[str]], statistic: str) -> list[list[float]]:
    """A row for each list of sites, a column for each denoising step, the largest (of SQNRs the least) of the sites.
    All but ``absmax`` are known by bins of steps."""
    layout = statistics.layout
    rows = []
    for names in sites:
        if statistic == "absmax":
            values = np.array([statistics.sites[name].absmax.max((0, 2)) for name in names]).max(0)
            rows.append([float(value) for value in values])
            continue
        by_bin = []
        for bin_ in range(layout.bins):
            found = [_statistic(statistics.sites[name].view(bin_), statistic) for name in names]
            by_bin.append(float((np.min if statistic == "sqnr" else np.max)(found)))
        rows.append([by_bin[layout.bin_of(step)] for step in range(layout.steps)])
    return rows


def _statistic(view: View, name: str) -> float:
    if name == "p99.9":
        return view.quantile(0.999)
    if name == "sqnr":
        return view.sqnr(PER_TOKEN)
    value: float = getattr(view, name)
    return value


def stand_out(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks that are ``STANDS_OUT`` robust deviations off the median block, by measure; the farthest first. What is
    not finite is farther than anything."""
    rows = []
    for name, meaning, logarithmic in MEASURES:
        if name not in blocks[0]:
            continue
        values = np.array([row[name] for row in blocks], float)
        scaled = np.log2(np.maximum(values, 1e-30)) if logarithmic else values
        sound = scaled[np.isfinite(scaled)]
        middle = np.median(sound) if len(sound) else np.nan
        # Where most blocks are alike, the median deviation is zero, and the mean one takes its place.
        away = np.abs(sound - middle)
        spread = (1.4826 * np.median(away) or 1.2533 * away.mean()) if len(sound) else np.nan
        for row, value, at in zip(blocks, values, scaled, strict=True):
            distance = (at - middle) / spread if spread > 0 else 0.0
            distance = distance if np.isfinite(at) else np.nan
            if not abs(distance) <= STANDS_OUT:
                rows.append(
                    {
                        "block": row["block"],
                        "measure": name,
                        "meaning": meaning,
                        "value": float(value),
                        "median": float(np.median(values[np.isfinite(values)])) if len(sound) else math.nan,
                        "deviations": float(distance),
                    }
                )
    return sorted(
        rows, key=lambda row: -abs(row["deviations"]) if row["deviations"] == row["deviations"] else -math.inf
    )


def correlations(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each cheap measure ranks the blocks as their sensitivity does: 1 the same, 0 not at all."""
    harm = [-row["sensitivity"] for row in blocks]
    rows = []
    for name, meaning, _ in MEASURES[:-1]:
        sign = -1 if name.endswith("sqnr") else 1
        rho, low, high = rank_correlation([sign * row[name] for row in blocks], harm)
        rows.append({"measure": name, "meaning": meaning, "spearman": rho, "ci95": [low, high]})
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row without lists and dicts in it."""
    zones = {f"zone {place}": value for place, value in enumerate(row["zones"])}
    rules = {f"sqnr {name}": value for name, value in row["sqnr"].items()}
    plain = {key: value for key, value in row.items() if key not in ("zones", "zones_direct", "sqnr")}
    return {**plain, "outlier_channels": len(row["outlier_channels"]), **zones, **rules}
