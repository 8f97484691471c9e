"""The table of a sweep as text cells, and those as Markdown, LaTeX and CSV: of what ``evaluate.sweep`` found."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from wanquant.runs.reports.columns import FIDELITY, FLOORS, FURTHER, NOTICE_COLLAPSE, estimate_text

Row = dict[str, Any]
Cells = tuple[list[str], list[list[str]], list[list[str]]]
#: What training has added to what PTQ alone makes of the same.
OVER_UNTRAINED, SINGLE_STEPS = "minus its PTQ baseline, dB", "the same of single steps, dB"
#: Beyond so many pairs it is not said how many it would take.
MANY_PAIRS = 100_000


def cells(summary: dict[str, Any]) -> Cells:
    """Heads, rows of the configurations by rank, and rows of the noise floor."""
    columns = _columns(summary)
    rows = [[make(row) for _, make in columns] for row in summary["rows"]]
    heads = [head for head, _ in columns]
    for job in summary["failed"]:
        told = {"rank": "–", heads[1]: f"{job['name']} (job {job['job']})", "verdict": "job failed"}
        rows.append([told.get(head, "") for head in heads])
    return heads, rows, _floor_rows(summary, heads)


def _columns(summary: dict[str, Any]) -> list[tuple[str, Callable[[Row], str]]]:
    metric, *further = FIDELITY
    reference = summary["reference"]
    attributes = "attributes" in summary["rows"][0]["metrics"]
    batches = {row["batch"] for row in summary["rows"]}
    usual = max(batches)

    def name(row: Row) -> str:
        return str(row["name"]) + (" (videos one at a time)" if row["batch"] != usual else "")

    columns: list[tuple[str, Callable[[Row], str]]] = [("rank", _rank), (" and ".join(summary["by"]), name)]
    if "protect" in summary["by"]:
        columns.append(("in BF16", _kept))
    if "quant" in summary["by"]:
        columns += [("weights", lambda row: _scale(row["quant"]["weights"])), ("activations", _activations)]
    columns += [
        ("linear FLOPs quantized", lambda row: f"{100 * row['protect']['fraction_of_flops_quantized']:.1f} %"),
        (_head(metric), lambda row: estimate_text(row["metrics"][metric[0]])),
        (f"minus {reference}, dB", lambda row: estimate_text(row["difference"]) if row["difference"] else ""),
        ("verdict", lambda row: row["verdict"]),
        ("gates", _gates),
        ("pairs to tell", _needed),
    ]
    if all(row["over_untrained"] for row in summary["rows"]):
        columns += [
            (OVER_UNTRAINED, lambda row: estimate_text(row["over_untrained"][metric[0]])),
            ("against its baseline", lambda row: row["over_untrained"]["verdict"]),
            (SINGLE_STEPS, lambda row: estimate_text(row["over_untrained"]["step_sqnr"])),
        ]
    columns += [(_head(column), _metric(column[0])) for column in further]
    if attributes:
        columns += [("attributes right", _metric("attributes")), ("minus BF16", _metric("difference.attributes"))]
    return columns


def further_markdown(summary: dict[str, Any]) -> list[str]:
    """VBench's table, how the errors look, and the rank correlations: what there is of them."""
    found = [vbench_cells(summary), (*further_cells(summary), []), (*ladder_cells(summary), [])]
    return [markdown(*cells, named=0) for cells in found if len(cells[0]) > 1]


def further_cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How the errors look: what all rows have of it."""
    rows = summary["rows"]
    columns = [
        (title + (f", {unit}" if unit else ""), _metric(name))
        for name, title, unit in (("block_sqnr", "blocks alone, SQNR", "dB"), *FURTHER)
        if all(name in row["metrics"] for row in rows)
    ]
    heads = [" and ".join(summary["by"]), *(head for head, _ in columns)]
    return heads, [[str(row["name"]), *(make(row) for _, make in columns)] for row in rows]


def vbench_cells(summary: dict[str, Any]) -> Cells:
    """VBench's means, and paired differences from BF16 and from the reference; below, BF16 and the noise floors. The
    dimensions that notice a collapse stand there in any case; nothing does where VBench has judged no row."""
    rows = summary["rows"]
    names = dict.fromkeys(name for row in rows for name in row["judged"])
    if not names:
        return [], [], []
    heads = [" and ".join(summary["by"])]
    for name in names:
        heads += [name.removeprefix("vbench."), "minus BF16", f"minus {summary['reference']}"]
    lacking = [name for name in NOTICE_COLLAPSE if f"vbench.{name}" not in names]
    table = [
        [
            str(row["name"]) + (" (collapsed)" if row["gates_failed"] else ""),
            *(cell for name in names for cell in _judged(row, name)),
            *["not measured"] * len(lacking),
        ]
        for row in rows
    ]
    floors = [
        [label, *(cell for name in names for cell in make(summary["judged_floors"], name)), *[""] * len(lacking)]
        for label, make in JUDGED_FLOORS
    ]
    return [*heads, *lacking], table, [row for row in floors if any(row[1:])]


def _judged(row: Row, name: str) -> list[str]:
    metrics = row["metrics"]
    if name not in metrics:
        return ["not judged", "", ""]
    found = [metrics[name], metrics.get(f"difference.{name}"), row["judged"][name]]
    return [estimate_text(metric, 5) if metric else "" for metric in found]


def _judged_floor(prefix: str, place: int) -> Callable[[dict[str, Any], str], list[str]]:
    """In the column of the means, or of the differences from BF16."""

    def cells(floors: dict[str, Any], name: str) -> list[str]:
        metric = floors.get(prefix + name)
        found = estimate_text(metric, 5) if metric else ""
        return [found if place == column else "" for column in range(3)]

    return cells


JUDGED_FLOORS = (
    ("BF16", _judged_floor("bf16.", 0)),
    (FLOORS[1][1], _judged_floor("floor_ulp.", 1)),
    (f"|{FLOORS[2][1]}|", _judged_floor("floor_seed.", 1)),
)


def ladder_cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Rank correlations, a measure a row, the cheaper ones as columns."""
    found = summary["ladder"]
    if found is None:
        return [], []
    rows = []
    for rung in found["rungs"]:
        known = rung["correlations"]
        values = {name: _correlation(value) for name, value in known.items()}
        rows.append([_measure(rung["name"]), *(values.get(name, "") for name in found["cheap"])])
    return ["ranks of, against", *map(_measure, found["cheap"])], rows


def _correlation(value: Sequence[float] | None) -> str:
    if value is None:
        return "constant"
    return estimate_text({"mean": value[0], "ci95": value[1:]}, 2)


def _measure(name: str) -> str:
    titles = {key: title for key, title, _ in (*FIDELITY, *FURTHER)}
    return {"block_sqnr": "blocks alone, SQNR", **titles}.get(name, name.removeprefix("vbench."))


def _gates(row: Row) -> str:
    return "FAILED: " + ", ".join(row["gates_failed"]) if row["gates_failed"] else "pass"


def _head(column: tuple[str, str, str]) -> str:
    return column[1] + (f", {column[2]}" if column[2] else "")


def _metric(key: str) -> Callable[[Row], str]:
    return lambda row: estimate_text(row["metrics"][key])


def _rank(row: Row) -> str:
    if row["rank"] is None:
        return "–"
    low, high = row["rank"]
    return str(low) if low == high else f"{low}–{high}"


def _kept(row: Row) -> str:
    protect = row["protect"]
    kept = [", ".join(map(str, protect["blocks"]))] if protect["blocks"] else []
    return "; ".join([*kept, *protect["modules"]]) or "none"


def _activations(row: Row) -> str:
    quant = row["quant"]
    smoothed = f", smoothed {quant['smoothing']}" if quant["smoothing"] else ""
    return ("static " if quant["activations"]["static"] else "") + _scale(quant["activations"]) + smoothed


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
        count = found[FIDELITY[0][0]]["n"]
        values = {_head(column): estimate_text(found[column[0]]) for column in FIDELITY}
        values[heads[1]] = label if count == summary["pairs"] else f"{label} ({count} pairs)"
        right = summary["floors"]["bf16."].get("attributes")
        if prefix == "floor_ulp." and right is not None:
            # What BF16 itself gets right, beside the floor of the same seeds.
            values["attributes right"] = estimate_text(right)
        rows.append([values.get(head, "") for head in heads])
    return rows


def protocol(summary: dict[str, Any]) -> str:
    """How it was measured, in a paragraph."""
    card, rows = summary["protocol"], summary["rows"]
    generation, made = card["generation"], card["made"]
    fixed = "".join(f"{group}={card[group]} " for group in ("quant", "protect") if group in card)
    planted = f" with outliers in the blocks {', '.join(map(str, card['outliers']))}" if card["outliers"] else ""
    counts = sorted({row["converted"] for row in rows})
    linears = f"{counts[0]} linears" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} linears"
    count, margin = summary["pairs"], summary["margin"]
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    text = (
        f"{fixed}on {card['model']}{planted}: {count} (prompt, seed) pairs, mean and 95 % bootstrap interval "
        f"clustered by prompt. Differences are taken pair by pair; their intervals are Student's over prompts, so wide "
        f"that 95 % is for all of them together (Bonferroni), as is that of the ranks for all pairs of rows. "
        f"Equivalent: within {margin:g} dB; pairs to tell: so many would resolve the difference observed. "
        f"{generation['num_frames']} frames of "
        f"{generation['height']}x{generation['width']}, {generation['steps']} steps, guidance "
        f"{generation['guidance_scale']}, flow shift {generation['flow_shift']}; calibrated on "
        f"{card['calibration_videos']} other videos; {linears} converted. {made['device'].upper()}, {threads}, torch "
        f"{made['packages']['torch']}, prompts {made['prompt_hash'][:12]}."
    )
    return " ".join([text, *(f"Caution: {caution}." for caution in summary["cautions"])])


def markdown(heads: list[str], rows: list[list[str]], floors: Sequence[list[str]] = (), named: int = 1) -> str:
    """The names of the floors, which stand in that column, in italics."""

    def escaped(row: list[str]) -> list[str]:
        return [re.sub(r"([|*])", r"\\\1", cell) for cell in row]

    below = [[f"*{cell}*" if place == named else cell for place, cell in enumerate(escaped(row))] for row in floors]
    lines = [escaped(heads), ["---"] * len(heads), *map(escaped, rows), *below]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "→": r"$\to$"}


def latex(heads: list[str], rows: list[list[str]], floors: Sequence[list[str]] = ()) -> str:
    """For the booktabs package; the floors behind a rule of their own."""

    def escaped(cell: str) -> str:
        return "".join(LATEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in cell)

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (heads, *rows, *floors)]
    if floors:
        lines.insert(1 + len(rows), r"\midrule")
    begin = rf"\begin{{tabular}}{{{'l' * len(heads)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])


def numbers(summary: dict[str, Any]) -> str:
    """CSV with every figure in a column of its own: a row a configuration, all its metrics."""
    rows = []
    for row in summary["rows"]:
        flat: dict[str, Any] = {
            **{key: row[key] for key in ("job", "name", "verdict", "pairs_needed", "converted", "seconds")},
            "blocks": " ".join(map(str, row["protect"]["blocks"])),
            "modules": " ".join(row["protect"]["modules"]),
            "fraction_of_flops_quantized": row["protect"]["fraction_of_flops_quantized"],
            "rank_low": row["rank"] and row["rank"][0],
            "rank_high": row["rank"] and row["rank"][1],
            "gates_failed": " ".join(row["gates_failed"]),
        }
        rows.append(flat | _flat({**row["metrics"], "minus_reference": row["difference"]}))
    rows += [{"job": job["job"], "name": job["name"], "verdict": "job failed"} for job in summary["failed"]]
    for prefix, label in FLOORS[1:]:
        rows.append({"name": label, **_flat(summary["floors"][prefix])})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, metric in metrics.items():
        mean, (low, high) = (metric["mean"], metric["ci95"]) if metric else (None, (None, None))
        flat |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return flat
