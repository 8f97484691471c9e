"""Writes the table of a sweep into a Markdown file, between the markers of its name.

python ptq.py experiment=protection hydra.sweep.dir=outputs/ptq/protection
python tools/write_table.py outputs/ptq/protection protection-tiny README.md

A sweep is over protections or over quantizations, and its first run is what the others are compared with. The
directory of a run with ``mode=analyze`` gives the table of its blocks instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanquant.evaluate.stats import Item, difference, estimate
from wanquant.runs.analysis_report import short
from wanquant.runs.files import write_atomic
from wanquant.runs.report import FIDELITY, FLOORS, estimate_text, failed_gates
from wanquant.runs.run import read_result

#: What runs must share to stand in one table, besides the one thing they vary.
SAME = (
    *("generation", "model.fingerprint", "model.outliers", "model.octaves"),
    *("calibration.videos", "calibration.input_absmax"),
    *(f"provenance.{key}" for key in ("prompts", "seeds", "packages", "device", "threads", "instructions", "version")),
    *(f"provenance.{key}" for key in ("git_commit", "dirty")),
)
#: What a sweep may vary, and by what it is equal otherwise.
VARIED = {"protect": ("protect.blocks", "protect.modules"), "quant": ("quant",)}


def table(results: list[dict[str, Any]], by: str) -> str:
    """Markdown: a row a configuration, then the noise floor, then how it was measured."""
    first, *others = results
    attributes = ["attributes"] if "attributes" in first["metrics"] else []
    heads = [by, *COLUMNS[by][0], "latent SQNR, dB", f"minus `{first[by]['name']}`, dB"]
    heads += ["PSNR, dB", "SSIM", *("attributes right" for _ in attributes), "gates"]
    sqnr, *further = (key for key, _, _ in FIDELITY)
    rows = []
    for result in results:
        metrics, gates, batch = result["metrics"], failed_gates(result), _batch(result)
        rows.append(
            [
                f"`{result[by]['name']}`" + (" (videos one at a time)" if batch != _batch(first) else ""),
                *COLUMNS[by][1](result),
                estimate_text(metrics[sqnr]),
                _minus(metrics[sqnr], first["metrics"][sqnr], len(others)),
                *(estimate_text(metrics[key]) for key in (*further, *attributes)),
                "FAILED: " + ", ".join(gates) if gates else "pass",
            ]
        )
    metrics = first["metrics"]
    for prefix, label in FLOORS[1:]:
        if prefix + sqnr in metrics:
            count = metrics[prefix + sqnr]["n"]
            cells = [f"*{label}*" if count == metrics[sqnr]["n"] else f"*{label}* ({count} pairs)"]
            cells += ["all", "0 %"] if by == "protect" else ["BF16", "BF16"]
            cells += [estimate_text(metrics[prefix + sqnr]), ""]
            cells += [estimate_text(metrics[prefix + key]) for key in further]
            # What BF16 itself gets right stands once, beside the floor of the same seeds.
            right = [estimate_text(metrics["bf16." + name]) if prefix == "floor_ulp." else "" for name in attributes]
            rows.append([*cells, *right, ""])
    lines = ["| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([*lines, "", protocol(results, by)])


def _protection_cells(result: dict[str, Any]) -> list[str]:
    protect = result["protect"]
    kept = [", ".join(map(str, protect["blocks"]))] if protect["blocks"] else []
    kept += [f"`{', '.join(protect['modules'])}`"] if protect["modules"] else []
    return ["; ".join(kept) or "none", f"{100 * protect['fraction_of_flops_quantized']:.1f} %"]


def _quant_cells(result: dict[str, Any]) -> list[str]:
    weights, activations = result["quant"]["weights"], result["quant"]["activations"]
    smoothing = result["quant"]["smoothing"]
    static = "static " if activations["static"] else ""
    smoothed = f", smoothed {smoothing}" if smoothing else ""
    return [_scale(weights), static + _scale(activations) + smoothed]


def _scale(side: dict[str, Any]) -> str:
    return "direct" if side["rule"] == "direct" else f"{side['granularity'].replace('_', ' ')}, {side['rule']}"


COLUMNS: dict[str, tuple[tuple[str, str], Callable[[dict[str, Any]], list[str]]]] = {
    "protect": (("blocks in BF16", "linear FLOPs quantized"), _protection_cells),
    "quant": (("weights", "activations"), _quant_cells),
}


def _batch(result: dict[str, Any]) -> int:
    """Videos denoised at a time."""
    return min(result["model"]["batch"], result["metrics"]["psnr"]["n"])


def _minus(ours: dict[str, Any], reference: dict[str, Any], comparisons: int) -> str:
    """The paired difference, one of so many; nothing for the reference itself."""
    if ours is reference:
        return ""
    ours_, reference_ = ([Item(**item) for item in metric["per_item"]] for metric in (ours, reference))
    if any(item.value is None for item in (*ours_, *reference_)):
        return "–"
    return estimate_text(estimate(difference(ours_, reference_), comparisons=comparisons).as_json())


def protocol(results: list[dict[str, Any]], by: str) -> str:
    one = results[0]
    generation, made = one["generation"], one["provenance"]
    pairs = one["metrics"]["psnr"]["n"]
    fixed = f"`quant={one['quant']['name']}`" if by == "protect" else f"`protect={one['protect']['name']}`"
    counts = [r["conversion"]["converted"] for r in results]
    linears = ", ".join(f"{n} with `{r[by]['name']}`" for n, r in zip(counts, results, strict=True))
    linears = f"{counts[0]} in every row" if len(set(counts)) == 1 else linears
    return (
        f"{fixed} on {one['model']['name']}, {pairs} (prompt, seed) pairs, mean and 95 % bootstrap interval clustered "
        f"by prompt; differences are taken pair by pair, and the 95 % of their intervals is for all of them together "
        f"(Bonferroni). {generation['num_frames']} frames of {generation['height']}x{generation['width']}, "
        f"{generation['steps']} steps, guidance {generation['guidance_scale']}, flow shift "
        f"{generation['flow_shift']}; calibrated on {one['calibration']['videos']} other videos. Linears converted: "
        f"{linears}. {_machine(made)}."
    )


def table_of_blocks(result: dict[str, Any]) -> str:
    """Markdown: a row a block, from the most sensitive to the least."""
    blocks, sensitive = result["analysis"]["blocks"], "sensitivity" in result["analysis"]["blocks"][0]
    order = "sensitivity" if sensitive else "block_sqnr"
    heads = ["block", *(["SQNR of the final latents, dB"] if sensitive else []), "SQNR of its own output, dB"]
    heads += ["largest magnitude behind it", "largest that enters its linears", "fewer than 3 mantissa bits"]
    rows = []
    for row in sorted(blocks, key=lambda row: (row[order] is not None, row[order])):
        measured = ["sensitivity", "block_sqnr"] if sensitive else ["block_sqnr"]
        cells = [estimate_text({"mean": row[m], "ci95": [row[f"{m}_low"], row[f"{m}_high"]]}) for m in measured]
        share = f"{100 * row['few_bits']:.1f} %"
        rows.append([str(row["block"]), *cells, short(row["residual_absmax"]), short(row["input_absmax"]), share])
    lines = ["| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]]
    made, quant, counted = result["provenance"], result["quant"]["name"], result["calibration"]
    correlations = [
        f"{row['meaning']}: {short(row['spearman'])} [{short(row['ci95'][0])}, {short(row['ci95'][1])}]"
        for row in result["analysis"]["correlation"]
    ]
    told = [f"Rank correlation with the harm to the final latents: {'; '.join(correlations)}."] if correlations else []
    measured_on = (
        f"{result['model']['name']}, each block quantized alone (`quant={quant}`), {counted['pairs']} (prompt, seed) "
        f"pairs, mean and 95 % bootstrap interval clustered by prompt. {_machine(made)}."
    )
    return "\n".join([*lines, "", measured_on, *(["", *told] if told else [])])


def _machine(made: dict[str, Any]) -> str:
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    prompts = made["prompt_hash"][:12]
    return f"{made['device'].upper()}, {threads}, torch {made['packages']['torch']}, prompts {prompts}"


def write(directory: Path) -> str:
    """The table of a sweep, or of an analysis."""
    if not (directory / "result.json").is_file():
        return table(*read_sweep(directory))
    result = read_result(directory)
    if result["status"] != "ok" or result.get("mode") != "analyze":
        raise ValueError(f"{directory} is one run, and not a finished analysis: a table takes a sweep of several")
    return table_of_blocks(result)


def read_sweep(sweep: Path) -> tuple[list[dict[str, Any]], str]:
    """The results of a sweep in the order of its jobs, and what it varies; ``ValueError`` unless they are finished and
    comparable."""
    folders = sorted((p for p in sweep.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    results = [read_result(folder) for folder in folders]
    if not results:
        raise ValueError(f"{sweep} holds no runs")
    for folder, result in zip(folders, results, strict=True):
        if result["status"] != "ok":
            raise ValueError(f"{folder} failed: {result['error']}")
    names = [result["quant"]["name"] for result in results]
    by = "protect" if len(set(names)) == 1 else "quant"
    same = (*SAME, *(path for other, paths in VARIED.items() if other != by for path in paths))
    for folder, result in zip(folders, results, strict=True):
        if result["demonstration"]:
            raise ValueError(f"{folder} has too few (prompt, seed) pairs to be compared with another run")
        for path in same:
            if pick(result, path) != pick(results[0], path):
                raise ValueError(f"{folder} differs from {folders[0]} in {path}: not one table")
    named = [result[by]["name"] for result in results]
    if len(set(named)) < len(named):
        raise ValueError(f"{sweep} holds two runs with {by}={max(named, key=named.count)}: not one sweep")
    return results, by


def pick(result: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        result = result[key]
    return result


def replace_table(text: str, name: str, new: str) -> str:
    """``text`` with ``new`` between the markers of that name; ``ValueError`` unless it has them once, in order."""
    begin, end = f"<!-- table {name}: begin -->", f"<!-- table {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin} and {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="of a sweep, or of a run with mode=analyze")
    parser.add_argument("name", help="of the markers: <!-- table NAME: begin --> and <!-- table NAME: end -->")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        write_atomic(args.file, replace_table(args.file.read_text(), args.name, write(args.directory)))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
