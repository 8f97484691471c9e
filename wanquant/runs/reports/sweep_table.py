"""The table of a sweep as text cells, and its figures as CSV: of what ``evaluate.sweep.summary`` found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wanquant.runs.reports.columns import (
    DRIFT,
    FLOORS,
    FURTHER,
    NOTICE_COLLAPSE,
    estimate_text,
    fidelity,
    head,
    measure,
)
from wanquant.runs.reports.page import render
from wanquant.runs.reports.table import Table, csv_text, markdown

Row = dict[str, Any]
#: What training has added to what PTQ alone makes of the same.
OVER_UNTRAINED, OVER_UNTRAINED_DRIFT = "minus its PTQ baseline, dB", "the same of final latents, dB"
#: Columns of the CSV that are a row's own values.
PLAIN = ("job", "name", "verdict", "could_see", "pairs_needed", "converted", "seconds")
#: Beyond so many pairs it is not said how many it would take.
MANY_PAIRS = 100_000
#: Below the means of VBench: label, prefix, and whether in the column of the means (0) or of the differences (1).
JUDGED_FLOORS = (("BF16", "bf16.", 0), (FLOORS[1][1], "floor_ulp.", 1), (f"|{FLOORS[2][1]}|", "floor_seed.", 1))


def cells(summary: dict[str, Any]) -> Table:
    """Rows of the configurations by rank, then of the jobs that failed; below them the noise floor."""
    columns = _columns(summary)
    rows = [[make(row) for make in columns.values()] for row in summary["rows"]]
    heads = list(columns)
    for job in summary["failed"]:
        known = {"rank": "–", heads[1]: f"{job['name']} (job {job['job']})", "verdict": "job failed"}
        rows.append([known.get(title, "") for title in heads])
    return Table(heads, rows, _floor_rows(summary, heads))


def _columns(summary: dict[str, Any]) -> dict[str, Callable[[Row], str]]:
    """What makes the cells of each column, by its head."""
    main, *further = fidelity(dict.fromkeys(name for row in summary["rows"] for name in row["metrics"]))
    usual = max(row["batch"] for row in summary["rows"])

    def name(row: Row) -> str:
        return str(row["name"]) + (" (videos one at a time)" if row["batch"] != usual else "")

    columns: dict[str, Callable[[Row], str]] = {"rank": _rank, _by(summary): name}
    if "protect" in summary["by"]:
        columns["in BF16"] = _kept
    if "quant" in summary["by"]:
        columns |= {"weights": _weights, "activations": _activations}
        if all(row.get("bits_per_weight") for row in summary["rows"]):
            columns["bits a weight"] = lambda row: f"{row['bits_per_weight']:.2f}"
    if any(row["lost_to_fp8"] for row in summary["rows"]):
        columns["inputs, weights lost to FP8"] = _lost
    columns |= {
        "linear FLOPs quantized": lambda row: f"{100 * row['protect']['fraction_of_flops_quantized']:.1f} %",
        head(main): _metric(main),
        f"minus {summary['reference']}, dB": lambda row: estimate_text(row["difference"]),
        "verdict": _verdict,
        "pairs to tell": _needed,
        "gates": _gates,
    }
    if all(row["over_untrained"] for row in summary["rows"]):
        columns |= {
            OVER_UNTRAINED: lambda row: estimate_text(row["over_untrained"][main]),
            "against its baseline": lambda row: row["over_untrained"]["verdict"],
            OVER_UNTRAINED_DRIFT: lambda row: estimate_text(row["over_untrained"].get(DRIFT)),
        }
    for other in further:
        columns[head(other)] = _metric(other)
        if other == DRIFT:
            columns[f"its drift minus {summary['reference']}'s, dB"] = lambda row: estimate_text(row["drift"])
    if "attributes" in summary["rows"][0]["metrics"]:
        columns |= {"attributes right": _metric("attributes"), "minus BF16": _metric("difference.attributes")}
    return columns


def _by(summary: dict[str, Any]) -> str:
    """The groups by which the configurations differ."""
    return " and ".join(summary["by"])


def _metric(key: str) -> Callable[[Row], str]:
    return lambda row: estimate_text(row["metrics"].get(key))


def _verdict(row: Row) -> str:
    """Where no difference was found, with the one that would have been."""
    told = str(row["verdict"])
    return f"{told} (4 in 5 times {row['could_see']:.2g} would show)" if told == "no difference found" else told


def _gates(row: Row) -> str:
    if not row["gates"]:
        return "no videos"
    return "FAILED: " + ", ".join(row["gates_failed"]) if row["gates_failed"] else "pass"


def _rank(row: Row) -> str:
    if row["rank"] is None:
        return "–"
    low, high = row["rank"]
    return str(low) if low == high else f"{low}–{high}"


def _kept(row: Row) -> str:
    protect = row["protect"]
    return "; ".join(filter(None, [", ".join(map(str, protect["blocks"])), *protect["modules"]])) or "none"


def _weights(row: Row) -> str:
    quant = row["quant"]
    branch = f", rank {quant['low_rank']} beside it" if quant.get("low_rank") else ""
    return _scale(quant["weights"]) + branch + (", error feedback" if quant["weights"].get("feedback") else "")


def _activations(row: Row) -> str:
    quant = row["quant"]
    if quant["activations"].get("format") == "bf16":
        return "BF16"
    smoothed = f", smoothed {quant['smoothing']}" if quant["smoothing"] else ""
    rotated = f", rotated by {quant['rotation']}" if quant.get("rotation") else ""
    return ("static " if quant["activations"]["static"] else "") + _scale(quant["activations"]) + smoothed + rotated


def _lost(row: Row) -> str:
    told = row["lost_to_fp8"]
    return f"{100 * told['inputs_share']:.3f} %, {100 * told['weights_share']:.4f} %" if told else ""


def _scale(side: dict[str, Any]) -> str:
    return "direct" if side["rule"] == "direct" else f"{side['granularity'].replace('_', ' ')}, {side['rule']}"


def _needed(row: Row) -> str:
    needed = row["pairs_needed"]
    return "" if needed is None else f"{needed:,}" if needed < MANY_PAIRS else f"> {MANY_PAIRS:,}"


def _floor_rows(summary: dict[str, Any], heads: list[str]) -> list[list[str]]:
    rows = []
    for prefix, label in FLOORS[1:]:
        found = summary["floors"][prefix]
        if not found:
            continue
        count = found[DRIFT]["n"]
        values = {head(name): estimate_text(found[name]) for name in fidelity(found)}
        values[heads[1]] = label if count == summary["pairs"] else f"{label} ({count} pairs)"
        if prefix == "floor_ulp.":  # what BF16 itself gets right, beside the floor of the same seeds
            values["attributes right"] = estimate_text(summary["floors"]["bf16."].get("attributes"))
        rows.append([values.get(title, "") for title in heads])
    return rows


def further_markdown(summary: dict[str, Any]) -> list[str]:
    """VBench's table, how the errors look, and the rank correlations: what there is of them."""
    found = (vbench_cells(summary), further_cells(summary), ladder_cells(summary))
    return [markdown(*table, named=0) for table in found if len(table.heads) > 1]


def further_cells(summary: dict[str, Any]) -> Table:
    """How the errors look: what all rows have of it."""
    rows = summary["rows"]
    names = [name for name in ("block_sqnr", *FURTHER) if all(name in row["metrics"] for row in rows)]
    table = [[str(row["name"]), *(_metric(name)(row) for name in names)] for row in rows]
    return Table([_by(summary), *map(head, names)], table)


def vbench_cells(summary: dict[str, Any]) -> Table:
    """VBench's means, and paired differences from BF16 and from the reference; below, BF16 and the noise floors. The
    dimensions that notice a collapse stand there in any case; nothing does where VBench has judged no row."""
    names = list(dict.fromkeys(name for row in summary["rows"] for name in row["judged"]))
    if not names:
        return Table([], [])
    lacking = [name for name in NOTICE_COLLAPSE if f"vbench.{name}" not in names]
    heads = [_by(summary)]
    for name in names:
        heads += [name.removeprefix("vbench."), "minus BF16", f"minus {summary['reference']}"]
    rows = []
    for row in summary["rows"]:
        line = [str(row["name"]) + (" (collapsed)" if row["gates_failed"] else "")]
        for name in names:
            line += _judged(row, name)
        rows.append([*line, *["not measured"] * len(lacking)])
    floors = []
    for label, prefix, place in JUDGED_FLOORS:
        line = [label, *[""] * (len(heads) - 1 + len(lacking))]
        line[1 + place : len(heads) : 3] = [estimate_text(summary["judged_floors"].get(prefix + n), 5) for n in names]
        floors += [line] if any(line[1:]) else []
    return Table([*heads, *lacking], rows, floors)


def _judged(row: Row, name: str) -> list[str]:
    """Mean, difference from BF16 and difference from the reference."""
    metrics = row["metrics"]
    if name not in metrics:
        return ["not judged", "", ""]
    return [
        estimate_text(metric, 5) for metric in (metrics[name], metrics.get(f"difference.{name}"), row["judged"][name])
    ]


def ladder_cells(summary: dict[str, Any]) -> Table:
    """Rank correlations, a measure a row, the cheaper ones as columns."""
    found = summary["ladder"]
    if found is None:
        return Table([], [])
    rows = []
    for rung in found["rungs"]:
        known = {name: _correlation(value) for name, value in rung["correlations"].items()}
        rows.append([measure(rung["name"]), *(known.get(name, "") for name in found["cheap"])])
    return Table(["ranks of, against", *map(measure, found["cheap"])], rows)


def _correlation(value: Sequence[float] | None) -> str:
    return "constant" if value is None else estimate_text({"mean": value[0], "ci95": value[1:]}, 2)


def protocol(summary: dict[str, Any]) -> str:
    """How it was measured, in a paragraph."""
    return " ".join(render("protocol.txt", summary=summary).split())


def numbers(summary: dict[str, Any]) -> str:
    """CSV with every figure in a column of its own: a row a configuration, all its metrics."""
    rows = []
    for row in summary["rows"]:
        protect, (low, high) = row["protect"], row["rank"] or (None, None)
        flat: dict[str, Any] = {
            **{key: row[key] for key in PLAIN},
            "blocks": " ".join(map(str, protect["blocks"])),
            "modules": " ".join(protect["modules"]),
            "fraction_of_flops_quantized": protect["fraction_of_flops_quantized"],
            "rank_low": low,
            "rank_high": high,
            "gates_failed": " ".join(row["gates_failed"]),
        }
        rows.append(flat | _flat({**row["metrics"], "minus_reference": row["difference"], "drift": row["drift"]}))
    rows += [{"job": job["job"], "name": job["name"], "verdict": "job failed"} for job in summary["failed"]]
    rows += [{"name": label, **_flat(summary["floors"][prefix])} for prefix, label in FLOORS[1:]]
    return csv_text(rows)


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """Mean, low and high of each."""
    flat: dict[str, Any] = {}
    for key, metric in metrics.items():
        mean, (low, high) = (metric["mean"], metric["ci95"]) if metric else (None, (None, None))
        flat |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return flat
