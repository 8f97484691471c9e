"""A sweep as one ranked table that a referee would accept: paired differences, corrected for their number.

Configurations are compared by the SQNR of their final latents against BF16's, pair by pair. The difference from the
reference configuration has an interval that is wide enough for all of them to hold together at 95 % (Bonferroni); a
rank is the span of places that no comparison of any two rules out, at 95 % for all of these together (Mogstad et al.
2024, *Inference for Ranks*, by the same correction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanquant.evaluate.stats import Estimate, Item, compared, difference
from wanquant.evaluate.sweep.ladder import ladder
from wanquant.runs.run import SCHEMA, clean_json, failed_result, read_result
from wanquant.runs.sweep_table import MANY_PAIRS

#: By which configurations are ranked, in dB, and the difference in it that is called none.
METRIC, MARGIN = "latent_sqnr", 1.0
#: What a sweep may vary, and by what its runs are equal otherwise.
VARIED = {"quant": ("quant",), "protect": ("protect.blocks", "protect.modules"), "qat": ("qat",)}
#: What runs must share to stand in one table.
SAME = (
    *("mode", "demonstration", "generation", "model.fingerprint", "model.outliers", "model.octaves"),
    *("calibration.videos", "calibration.input_absmax"),
    *(f"provenance.{key}" for key in ("prompts", "seeds", "packages", "device", "threads", "instructions", "version")),
    *("provenance.bf16_products", "provenance.device_name"),
)
#: What they should share; if they do not, it is said.
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
    done: list[tuple[int, dict[str, Any]]] = []
    failed, unfinished = [], []
    for job, result in ((int(folder.name), _result(folder)) for folder in jobs_of(sweep)):
        if result["status"] == "ok":
            done.append((job, result))
        elif result["status"] == "failed":
            failed.append({"job": job, "name": _told_name(result), "error": result["error"]})
        else:
            unfinished.append(job)
    summary: dict[str, Any] = {"schema": SCHEMA, "sweep": sweep.name, "failed": failed, "unfinished": unfinished}
    if not done:
        return {**summary, "rows": []}
    results = [result for _, result in done]
    if any(result.get("mode") != "quantize" for result in results):
        raise ValueError(f"{sweep} holds analyses, of which each has its own report")
    refuse_incomparable([(sweep / str(job), result) for job, result in done])
    names = names_of(results)
    chosen = reference is not None
    reference = names[0] if reference is None else reference
    if reference not in names:
        raise ValueError(f"no configuration is named {reference}: choose {', '.join(names)}")
    rows = [_row(job, name, result, len(done)) for name, (job, result) in zip(names, done, strict=True)]
    _compare(rows, [_items(result) for result in results], names.index(reference), margin)
    _compare_judged(rows, names.index(reference))
    if results[0]["demonstration"]:
        for row in rows:
            row["rank"] = None
            if row["verdict"] not in ("reference", "broken", "collapsed"):
                row["verdict"] = "too few pairs"
    rows.sort(key=lambda row: (row["rank"] is not None, _mean(row)), reverse=True)
    not_judged = [(job, result["not_judged"]) for job, result in done if result.get("not_judged")]
    found = {
        **summary,
        "by": varied(results),
        "metric": METRIC,
        "reference": reference,
        "margin": margin,
        "demonstration": results[0]["demonstration"],
        "cautions": [
            *_cautions(results, rows, reference),
            *([] if chosen else _without_first(failed, done, reference)),
            *(f"job {job} was not judged: {error}" for job, error in not_judged),
        ],
        "rows": rows,
        "floors": {prefix: _floor(results[0], prefix) for prefix in ("floor_ulp.", "floor_seed.", "bf16.")},
        "pairs": results[0]["metrics"][METRIC]["n"],
        "ladder": ladder(rows),
        "judged_floors": _judged_floors(results),
        "not_judged": not_judged,
        "protocol": _protocol(results),
    }
    plain: dict[str, Any] = clean_json(found)
    return plain


def varied(results: Sequence[dict[str, Any]]) -> list[str]:
    """The groups in which the runs differ by name; the protection if in none."""
    found = [group for group in VARIED if len({pick(result, f"{group}.name") or "" for result in results}) > 1]
    return found or ["protect"]


def names_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the runs apart: the names of the groups in which they differ, and where those are the same the
    settings that are not (``distill, qat.lr=0.0001``); ``ValueError`` if nothing does."""
    groups = varied(results)
    parts = [[result[group]["name"] for group in groups] for result in results]
    for group in VARIED:
        settings = [_settings(result, group) for result in results]
        told = [str(pick(result, f"{group}.name")) for result in results]
        whole = [", ".join(part) for part in parts]
        for key in sorted({key for each in settings for key in each}):
            for place, each in enumerate(settings):
                alike = [
                    settings[other].get(key)
                    for other in range(len(results))
                    if told[other] == told[place] and (group not in groups or whole[other] == whole[place])
                ]
                if any(value != each.get(key) for value in alike):
                    parts[place].append(f"{key}={each.get(key)}")
    names = [", ".join(part) for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the sweep holds two runs of {twice[0]}")
    return names


def _settings(result: dict[str, Any], group: str) -> dict[str, Any]:
    """All that can be set in a group, by its whole key; what only names it left out."""
    found: dict[str, Any] = {}

    def note(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in ("name", "by_language"):
                    note(f"{key}.{name}", inner)
        else:
            found[key] = value

    for path in VARIED[group]:
        note(path, pick(result, path))
    return found


def refuse_incomparable(runs: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """``ValueError`` names what keeps two runs from standing in one table."""
    first_folder, first = runs[0]
    for folder, result in runs[1:]:
        for path in SAME:
            if pick(result, path) != pick(first, path):
                raise ValueError(f"{folder} differs from {first_folder} in {path}: not one table")


def pick(result: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        result = result.get(key, {})
    return result


def _row(job: int, name: str, result: dict[str, Any], runs: int) -> dict[str, Any]:
    protect = result["protect"]
    return {
        "job": job,
        "name": name,
        "quant": {key: result["quant"][key] for key in ("name", "format", "weights", "activations", "smoothing")},
        "protect": {key: protect[key] for key in ("name", "blocks", "modules", "fraction_of_flops_quantized")},
        "converted": result["conversion"]["converted"],
        "batch": _batch(result),
        "gates_failed": [gate for gate, found in result["gates"].items() if found["verdict"] == "fail"],
        "gates": result["gates"],
        "metrics": {key: value for key, value in _metrics(result).items() if not key.startswith(("floor_", "bf16."))},
        "vbench": result.get("evaluations", {}).get("own", {}).get("vbench", {}),
        "seconds": result["timings"]["total"],
        "over_untrained": _over_untrained(result, runs),
    }


def _over_untrained(result: dict[str, Any], runs: int) -> dict[str, Any] | None:
    """Of a training: its difference from its baseline, its interval for as many comparisons as there are runs."""
    if METRIC not in result.get("over_untrained", {}):
        return None
    found = {
        name: compared([_item(item) for item in result["over_untrained"][name]["per_item"]], runs)
        for name in (METRIC, "step_sqnr")
    }
    told = "too few pairs" if result["demonstration"] else verdict(found[METRIC], 0.0)
    return {name: _without_items(value.as_json()) for name, value in found.items()} | {"verdict": told}


def _metrics(result: dict[str, Any]) -> dict[str, Any]:
    """And what an evaluation of the run's own prompts has added, and the noise of the blocks alone."""
    own = result.get("evaluations", {}).get("own", {}).get("metrics", {})
    alone = {"block_sqnr": result["block_sqnr"]} if result.get("block_sqnr") else {}
    return {**result["metrics"], **own, **alone}


def _mean(row: dict[str, Any]) -> float:
    mean = row["metrics"][METRIC]["mean"]
    return -math.inf if mean is None else float(mean)


def _batch(result: dict[str, Any]) -> int:
    """Videos denoised at a time."""
    return min(int(result["model"]["batch"]), int(result["metrics"][METRIC]["n"]))


def _item(item: dict[str, Any]) -> Item:
    """What is not finite is null in JSON."""
    return Item(**{**item, "value": math.nan if item["value"] is None else item["value"]})


def _items(result: dict[str, Any]) -> list[Item] | None:
    """The pairs' values of the ranked metric; None where one is not finite."""
    items = [Item(**item) for item in result["metrics"][METRIC]["per_item"]]
    return None if any(item.value is None for item in items) else items


def _compare(rows: list[dict[str, Any]], items: list[list[Item] | None], reference: int, margin: float) -> None:
    """Adds to each row its difference from the reference, a verdict, the pairs it would take, and its rank. What is
    broken or has collapsed has no rank, whatever its average, and takes nobody else's place."""
    for place, row in enumerate(rows):
        if place == reference:
            row |= {"difference": None, "verdict": "reference", "pairs_needed": None}
            continue
        found = _between(items[place], items[reference], len(rows) - 1)
        row["difference"] = None if found is None else _without_items(found.as_json())
        row["pairs_needed"] = None if found is None else pairs_needed(found)
        row["verdict"] = "broken" if found is None else "collapsed" if row["gates_failed"] else verdict(found, margin)
    sound = [place for place, row in enumerate(rows) if items[place] is not None and not row["gates_failed"]]
    for place, row in enumerate(rows):
        row["rank"] = _rank(place, sound, items) if place in sound else None


def _compare_judged(rows: list[dict[str, Any]], reference: int) -> None:
    """Adds to each row, under ``judged``, what VBench's scores differ by from the reference's, pair by pair; None for
    the reference itself, and where the pairs are not the same."""
    for row in rows:
        row["judged"] = {}
        for name in (name for name in row["metrics"] if name.startswith("vbench.")):
            row["judged"][name] = None
            sides = [_judged_items(other, name) for other in (row, rows[reference])]
            same = [{(item.prompt, item.seed) for item in items} for items in sides]
            if row is not rows[reference] and same[0] == same[1]:
                row["judged"][name] = _without_items(compared(difference(*sides), len(rows) - 1).as_json())


def _judged_floors(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of VBench: of BF16, which is the same in all runs, and of its noise floors."""
    found: dict[str, Any] = {}
    for result in results:
        own = result.get("evaluations", {}).get("own", {}).get("metrics", {})
        names = [name for name in own if name.startswith(("bf16.vbench.", "floor_"))]
        found |= {name: _without_items(own[name]) for name in names if "vbench." in name and name not in found}
    return found


def _judged_items(row: dict[str, Any], name: str) -> list[Item]:
    return [Item(**item) for item in row["metrics"].get(name, {"per_item": []})["per_item"]]


def _rank(place: int, sound: Sequence[int], items: list[list[Item] | None]) -> list[int]:
    """The places no comparison rules out."""
    above = below = 0
    for other in sound:
        if other != place:
            found = _between(items[place], items[other], len(sound) * (len(sound) - 1) // 2)
            above += found is not None and found.high < 0
            below += found is not None and found.low > 0
    return [1 + above, len(sound) - below]


def _between(ours: list[Item] | None, theirs: list[Item] | None, comparisons: int) -> Estimate | None:
    if ours is None or theirs is None:
        return None
    return compared(difference(ours, theirs), comparisons)


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
    texts = [f"{row['name']} collapsed, and is what the others are compared with" for row in rows
             if row["name"] == reference and row["gates_failed"]]  # fmt: skip
    if results[0]["demonstration"]:
        count = results[0]["metrics"][METRIC]["n"]
        texts.append(f"{count} (prompt, seed) pairs are a demonstration, compare nothing by them")
    texts += _judged_otherwise([row["vbench"] for row in rows if row["vbench"]])
    for path in SHOULD_SAME:
        values = {str(pick(result, path)) for result in results}
        if len(values) > 1:
            texts.append(f"the runs differ in {path}: {', '.join(sorted(values))}")
    if any(result["provenance"]["dirty"] for result in results):
        texts.append("made by code that was changed after its commit")
    return texts


def _judged_otherwise(told: Sequence[dict[str, Any]]) -> list[str]:
    """Where VBench did not judge all runs alike."""
    texts = []
    for key in ("version", "foreign_weights", "reader", "device"):
        if len({str(each[key]) for each in told}) > 1:
            texts.append(f"VBench did not judge all runs by the same {key.replace('_', ' ')}")
    sums = {(name, sum_) for each in told for name, sum_ in each["weights"].items()}
    if len(sums) > len({name for name, _ in sums}):
        texts.append("VBench did not judge all runs by the same weights")
    return texts


def _without_first(failed: list[dict[str, Any]], done: list[tuple[int, dict[str, Any]]], reference: str) -> list[str]:
    first = done[0][0]
    lost = [job["job"] for job in failed if job["job"] < first]
    return [f"job {lost[0]} failed, so the others are compared with {reference}"] if lost else []


def _protocol(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = results[0]
    made = first["provenance"]
    return {
        "model": first["model"]["name"],
        "fingerprint": first["model"]["fingerprint"],
        "outliers": first["model"]["outliers"],
        **{group: first[group]["name"] for group in VARIED if group in first and group not in varied(results)},
        "generation": first["generation"],
        "calibration_videos": first["calibration"]["videos"],
        "made": made,
    }


def _floor(result: dict[str, Any], prefix: str) -> dict[str, Any]:
    metrics = result["metrics"]
    return {key[len(prefix) :]: _without_items(metrics[key]) for key in metrics if key.startswith(prefix)}


def _without_items(metric: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metric.items() if key != "per_item"}


def _told_name(result: dict[str, Any]) -> str:
    """Of a failed run: what is known of it."""
    return ", ".join(result[group]["name"] for group in VARIED if group in result) or "unknown"
