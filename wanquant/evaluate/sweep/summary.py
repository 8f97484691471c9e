"""A sweep as one ranked table that a referee would accept: paired differences, corrected for their number.

Configurations are compared by the SQNR of single denoising steps along BF16's trajectories, pair by pair, and beside it
by that of their final latents, which has their drift in it. The difference from the reference configuration has an
interval that is wide enough for all of them to hold together at 95 % (Bonferroni); ``could_see`` is the difference
that would have shown four times in five. A
rank is the span of places that no comparison of any two rules out, at 95 % for all of these together (Mogstad et al.
2024, *Inference for Ranks*, by the same correction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanquant.evaluate.stats import Estimate, Item, compared, detectable, difference
from wanquant.evaluate.sweep.ladder import ladder
from wanquant.evaluate.sweep.names import VARIED, names_of, pick, refuse_incomparable, varied
from wanquant.runs.reports.columns import DRIFT, STEP_SQNR
from wanquant.runs.reports.sweep_table import MANY_PAIRS
from wanquant.runs.run import SCHEMA, clean_json, failed_result, read_result

#: By which configurations are ranked, in dB, and the difference in it that is called none.
METRIC, MARGIN = STEP_SQNR, 0.5
#: What is told of a quantization.
QUANT = ("name", "format", "weights", "activations", "smoothing", "rotation", "low_rank")
#: What runs should share; if they do not, it is said.
SHOULD_SAME = ("provenance.git_commit", "provenance.dirty")


def jobs_of(sweep: Path) -> list[Path]:
    """The run directories of a sweep, in the order of its jobs; ``ValueError`` if there are none."""
    folders = [path for path in sweep.iterdir() if path.is_dir() and path.name.isdigit()] if sweep.is_dir() else []
    if not folders:
        raise ValueError(f"{sweep} holds no runs of a sweep")
    return sorted(folders, key=lambda path: int(path.name))


def results_of(sweep: Path) -> list[dict[str, Any]]:
    return [_result(folder) for folder in jobs_of(sweep)]


def _result(folder: Path) -> dict[str, Any]:
    """``status`` is ``unfinished`` where there is no result, ``failed`` where it cannot be read."""
    if not (folder / "result.json").is_file():
        return {"status": "unfinished"}
    try:
        return read_result(folder)
    except ValueError as error:
        return failed_result(str(error))


def summarize(sweep: Path, reference: str | None = None, margin: float = MARGIN) -> dict[str, Any]:
    """All that is drawn of a sweep, as plain values; also of one that still runs or in which jobs failed.

    ``reference`` is the name of the configuration the others are compared with, the first one unless told otherwise.
    """
    found = {int(folder.name): _result(folder) for folder in jobs_of(sweep)}
    done = {job: result for job, result in found.items() if result["status"] == "ok"}
    lost = {job: result for job, result in found.items() if result["status"] == "failed"}
    summary = {
        "schema": SCHEMA,
        "sweep": sweep.name,
        "failed": [{"job": job, "name": _told_name(each), "error": each["error"]} for job, each in lost.items()],
        "unfinished": [job for job in found if job not in done and job not in lost],
    }
    if not done:
        return {**summary, "rows": []}
    results = list(done.values())
    if any(result.get("mode") != "quantize" for result in results):
        raise ValueError(f"{sweep} holds analyses, of which each has its own report")
    refuse_incomparable([(sweep / str(job), result) for job, result in done.items()])
    names = names_of(results)
    if reference is not None and reference not in names:
        raise ValueError(f"no configuration is named {reference}: choose {', '.join(names)}")
    chosen = names[0] if reference is None else reference
    rows = [_row(job, name, result, len(done)) for name, (job, result) in zip(names, done.items(), strict=True)]
    _compare(rows, names.index(chosen), margin)
    if results[0]["demonstration"]:
        _without_verdicts(rows)
    rows.sort(key=lambda row: (row["rank"] is not None, _mean(row)), reverse=True)
    cautions = _cautions(results, rows, chosen)
    earlier = [job for job in lost if job < min(done)]
    if reference is None and earlier:
        cautions.append(f"job {earlier[0]} failed, so the others are compared with {chosen}")
    plain: dict[str, Any] = clean_json({**summary, **_whole(done, rows, chosen, margin, cautions)})
    return plain


def _whole(
    done: dict[int, dict[str, Any]], rows: list[dict[str, Any]], reference: str, margin: float, cautions: list[str]
) -> dict[str, Any]:
    results = list(done.values())
    not_judged = [(job, result["not_judged"]) for job, result in done.items() if result.get("not_judged")]
    return {
        "by": varied(results),
        "metric": METRIC,
        "reference": reference,
        "margin": margin,
        "demonstration": results[0]["demonstration"],
        "cautions": [*cautions, *(f"job {job} was not judged: {error}" for job, error in not_judged)],
        "rows": rows,
        "floors": {prefix: _floor(results[0], prefix) for prefix in ("floor_ulp.", "floor_seed.", "bf16.")},
        "pairs": results[0]["metrics"][METRIC]["n"],
        "ladder": ladder(rows),
        "judged_floors": _judged_floors(results),
        "not_judged": not_judged,
        "protocol": _protocol(results),
    }


def _row(job: int, name: str, result: dict[str, Any], runs: int) -> dict[str, Any]:
    protect = result["protect"]
    # With what an evaluation of the run's own prompts has added, and the noise of the blocks alone.
    metrics = {**result["metrics"], **pick(result, "evaluations.own.metrics")}
    metrics |= {"block_sqnr": result["block_sqnr"]} if result.get("block_sqnr") else {}
    return {
        "job": job,
        "name": name,
        "quant": {key: result["quant"].get(key) for key in QUANT},
        "bits_per_weight": result.get("bits_per_weight"),
        "lost_to_fp8": result.get("lost_to_fp8"),
        "protect": {key: protect[key] for key in ("name", "blocks", "modules", "fraction_of_flops_quantized")},
        "converted": result["conversion"]["converted"],
        "batch": min(int(result["model"]["batch"]), int(result["metrics"][METRIC]["n"])),  # denoised at a time
        "gates_failed": [gate for gate, found in result["gates"].items() if found["verdict"] == "fail"],
        "gates": result["gates"],
        "metrics": {key: value for key, value in metrics.items() if not key.startswith(("floor_", "bf16."))},
        "vbench": pick(result, "evaluations.own.vbench"),
        "single_steps": result["single_steps"][METRIC],
        "seconds": result["timings"]["total"],
        "over_untrained": _over_untrained(result, runs),
    }


def _over_untrained(result: dict[str, Any], runs: int) -> dict[str, Any] | None:
    """Of a training: its difference from its baseline, its interval for as many comparisons as there are runs."""
    if METRIC not in result.get("over_untrained", {}):
        return None
    over = result["over_untrained"]
    found = {name: compared(_items(over[name]), runs) for name in (METRIC, DRIFT) if name in over}
    told = "too few pairs" if result["demonstration"] else verdict(found[METRIC], 0.0)
    return {name: _without_items(value.as_json()) for name, value in found.items()} | {"verdict": told}


def _compare(rows: list[dict[str, Any]], reference: int, margin: float) -> None:
    """Adds to each row its difference from the reference, a verdict, the difference that would have shown, the pairs it
    would take, its rank, its drift's difference, and what VBench differs by. What is broken or has collapsed has no
    rank, whatever its average, and takes nobody else's place."""
    items = [_items(row["metrics"][METRIC]) for row in rows]
    for row, ours in zip(rows, items, strict=True):
        if row is rows[reference]:
            row |= {"difference": None, "verdict": "reference", "could_see": None, "pairs_needed": None}
            continue
        found = compared(difference(ours, items[reference]), len(rows) - 1)
        broken = math.isnan(found.mean)
        row["difference"] = None if broken else _without_items(found.as_json())
        row["could_see"] = None if math.isnan(found.low) else detectable(found, len(rows) - 1)
        row["pairs_needed"] = pairs_needed(found)
        row["verdict"] = "broken" if broken else "collapsed" if row["gates_failed"] else verdict(found, margin)
    sound = [place for place, row in enumerate(rows) if _mean(row) > -math.inf and not row["gates_failed"]]
    for place, row in enumerate(rows):
        row["rank"] = _rank(items[place], [items[other] for other in sound]) if place in sound else None
    for row in rows:
        row["drift"] = _judged(row, rows[reference], DRIFT, len(rows) - 1)
        names = [name for name in row["metrics"] if name.startswith("vbench.")]
        row["judged"] = {name: _judged(row, rows[reference], name, len(rows) - 1) for name in names}


def _rank(ours: list[Item], sound: Sequence[list[Item]]) -> list[int]:
    """The places no comparison rules out."""
    count = len(sound) * (len(sound) - 1) // 2
    found = [compared(difference(ours, theirs), count) for theirs in sound if theirs is not ours]
    return [1 + sum(each.high < 0 for each in found), len(sound) - sum(each.low > 0 for each in found)]


def _judged(row: dict[str, Any], reference: dict[str, Any], name: str, comparisons: int) -> dict[str, Any] | None:
    """What another metric differs by from the reference's, pair by pair; None for the reference itself, and where the
    pairs are not the same, or there are none."""
    ours, theirs = (_items(each["metrics"].get(name, {"per_item": []})) for each in (row, reference))
    alike = {(i.prompt, i.seed) for i in ours} == {(i.prompt, i.seed) for i in theirs}
    if row is reference or not ours or not alike or any(math.isnan(i.value) for i in (*ours, *theirs)):
        return None
    return _without_items(compared(difference(ours, theirs), comparisons).as_json())


def _without_verdicts(rows: list[dict[str, Any]]) -> None:
    """Of a demonstration."""
    for row in rows:
        row["rank"] = None
        if row["verdict"] not in ("reference", "broken", "collapsed"):
            row["verdict"] = "too few pairs"


def verdict(found: Estimate, margin: float) -> str:
    """In words: an interval that holds 0 is no difference found, one that lies inside the margin is equivalent."""
    if math.isnan(found.low):
        return "unknown"
    if -margin < found.low and found.high < margin:
        return f"equivalent (within {margin:g})"
    if found.low <= 0 <= found.high:
        return "no difference found"
    return "better" if found.low > 0 else "worse"


def pairs_needed(found: Estimate) -> int | None:
    """Pairs after which an interval that shrinks with their square root would no longer hold 0, were the difference
    the one observed; None if that cannot be told, ``MANY_PAIRS`` for those and more."""
    if math.isnan(found.low):
        return None
    toward_zero = found.mean - found.low if found.mean > 0 else found.high - found.mean
    if found.mean == 0:
        return None if toward_zero == 0 else MANY_PAIRS
    return min(MANY_PAIRS, max(1, math.ceil(len(found.items) * (toward_zero / found.mean) ** 2)))


def _cautions(results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], reference: str) -> list[str]:
    collapsed = [row["name"] for row in rows if row["name"] == reference and row["gates_failed"]]
    texts = [f"{name} collapsed, and is what the others are compared with" for name in collapsed]
    if results[0]["demonstration"]:
        count = results[0]["metrics"][METRIC]["n"]
        texts.append(f"{count} (prompt, seed) pairs are a demonstration, compare nothing by them")
    told = [row["vbench"] for row in rows if row["vbench"]]
    for key in ("version", "foreign_weights", "reader", "device"):
        if len({str(each[key]) for each in told}) > 1:
            texts.append(f"VBench did not judge all runs by the same {key.replace('_', ' ')}")
    sums = {(name, sum_) for each in told for name, sum_ in each["weights"].items()}
    if len(sums) > len({name for name, _ in sums}):
        texts.append("VBench did not judge all runs by the same weights")
    for path in SHOULD_SAME:
        values = {str(pick(result, path)) for result in results}
        if len(values) > 1:
            texts.append(f"the runs differ in {path}: {', '.join(sorted(values))}")
    if any(result["provenance"]["dirty"] for result in results):
        texts.append("made by code that was changed after its commit")
    return texts


def _protocol(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = results[0]
    return {
        "model": first["model"]["name"],
        "fingerprint": first["model"]["fingerprint"],
        "outliers": first["model"]["outliers"],
        **{group: first[group]["name"] for group in VARIED if group in first and group not in varied(results)},
        "generation": first["generation"],
        "calibration_videos": first["calibration"]["videos"],
        "made": first["provenance"],
    }


def _floor(result: dict[str, Any], prefix: str) -> dict[str, Any]:
    metrics = result["metrics"]
    return {key[len(prefix) :]: _without_items(metrics[key]) for key in metrics if key.startswith(prefix)}


def _judged_floors(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of VBench: of BF16, which is the same in all runs, and of its noise floors."""
    found: dict[str, Any] = {}
    for result in results:
        for name, metric in pick(result, "evaluations.own.metrics").items():
            if name.startswith(("bf16.vbench.", "floor_")) and "vbench." in name:
                found.setdefault(name, _without_items(metric))
    return found


def _mean(row: dict[str, Any]) -> float:
    mean = row["metrics"][METRIC]["mean"]
    return -math.inf if mean is None else float(mean)


def _items(metric: dict[str, Any]) -> list[Item]:
    """What is not finite is null in JSON."""
    return [Item(**{**item, "value": math.nan if item["value"] is None else item["value"]})
            for item in metric["per_item"]]  # fmt: skip


def _without_items(metric: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metric.items() if key != "per_item"}


def _told_name(result: dict[str, Any]) -> str:
    """Of a failed run: what is known of it."""
    return ", ".join(result[group]["name"] for group in VARIED if group in result) or "unknown"
