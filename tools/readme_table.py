"""Writes the table of a sweep into README.md, between its markers.

python ptq.py -m protect=none,entry,exit,boundary prompts=pairs24 hydra.sweep.dir=outputs/ptq/protection
python tools/readme_table.py outputs/ptq/protection
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wanquant.runs.files import write_atomic
from wanquant.runs.report import ATTRIBUTES, FIDELITY, FLOORS, estimate_text, failed_gates
from wanquant.runs.run import read_result

#: What runs must share to stand in one table.
SAME = (
    *("quant", "generation", "model.fingerprint", "calibration.videos", "calibration.input_absmax"),
    *(f"provenance.{key}" for key in ("prompts", "seeds", "packages", "device", "threads", "version")),
    *(f"provenance.{key}" for key in ("git_commit", "dirty")),
)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a configuration, then the noise floor, then how it was measured."""
    attributes = [name for name in ATTRIBUTES if name in results[0]["metrics"]]
    heads = [
        "protect",
        "blocks in BF16",
        "linear FLOPs quantized",
        *(f"{t}{', ' + u if u else ''}" for _, t, u in FIDELITY),
    ]
    heads += [f"{name} right" if name != "attributes" else "mean of the four" for name in attributes] + ["gates"]
    keys = [key for key, _, _ in FIDELITY] + attributes
    rows = []
    for result in results:
        kept, metrics = result["protect"]["blocks"], result["metrics"]
        gates = failed_gates(result)
        rows.append(
            [
                f"`{result['protect']['name']}`",
                ", ".join(map(str, kept)) or "none",
                f"{100 * result['protect']['fraction_of_flops_quantized']:.1f} %",
                *(estimate_text(metrics[key]) for key in keys),
                "FAILED: " + ", ".join(gates) if gates else "pass",
            ]
        )
    first = results[0]["metrics"]
    for prefix, label in FLOORS[1:]:
        if prefix + FIDELITY[0][0] in first:
            values = [estimate_text(first[prefix + key]) for key, _, _ in FIDELITY]
            # What BF16 itself gets right stands once, beside the floor of the same seeds.
            right = [estimate_text(first["bf16." + name]) if prefix == "floor_ulp." else "" for name in attributes]
            count = first[prefix + FIDELITY[0][0]]["n"]
            name = f"*{label}*" if count == first["psnr"]["n"] else f"*{label}* ({count} pairs)"
            rows.append([name, "all", "0 %", *values, *right, ""])
    lines = ["| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([*lines, "", protocol(results)])


def protocol(results: list[dict[str, Any]]) -> str:
    one = results[0]
    generation, made = one["generation"], one["provenance"]
    pairs = one["metrics"]["psnr"]["n"]
    linears = ", ".join(f"{r['conversion']['converted']} with `{r['protect']['name']}`" for r in results)
    return (
        f"`quant={one['quant']['name']}` on {one['model']['name']}, {pairs} (prompt, seed) pairs, mean and 95 % "
        f"bootstrap interval clustered by prompt; {generation['steps']} steps, guidance "
        f"{generation['guidance_scale']}, flow shift {generation['flow_shift']}, {generation['num_frames']} frames of "
        f"{generation['height']}x{generation['width']}. Linears converted: {linears}. {made['device'].upper()}, "
        f"{made['threads']} threads, torch {made['packages']['torch']}, prompts {made['prompt_hash'][:12]}."
    )


def read_sweep(sweep: Path) -> list[dict[str, Any]]:
    """The results of a sweep in the order of its jobs; ``ValueError`` unless they are finished and comparable."""
    folders = sorted((p for p in sweep.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    results = [read_result(folder) for folder in folders]
    if not results:
        raise ValueError(f"{sweep} holds no runs")
    for folder, result in zip(folders, results, strict=True):
        if result["status"] != "ok":
            raise ValueError(f"{folder} failed: {result['error']}")
        if result["demonstration"]:
            raise ValueError(f"{folder} has too few (prompt, seed) pairs to be compared with another run")
        for same in SAME:
            if pick(result, same) != pick(results[0], same):
                raise ValueError(f"{folder} differs from {folders[0]} in {same}: not one table")
    named = [result["protect"]["name"] for result in results]
    if len(set(named)) < len(named):
        raise ValueError(f"{sweep} holds two runs with protect={max(named, key=named.count)}: not one sweep")
    return results


def pick(result: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        result = result[key]
    return result


def replace_table(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers; ``ValueError`` unless it has them once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must hold {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    args = parser.parse_args()
    try:
        write_atomic(args.readme, replace_table(args.readme.read_text(), table(read_sweep(args.sweep))))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
