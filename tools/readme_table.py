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
SAME = ("quant", "generation", "model.fingerprint", "provenance.prompts", "provenance.seeds", "provenance.packages")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a configuration, then the noise floor, then how it was measured."""
    attributes = [name for name in ATTRIBUTES if name in results[0]["metrics"]]
    heads = ["protect", "blocks in BF16", "FLOPs quantized", *(f"{t}{', ' + u if u else ''}" for _, t, u in FIDELITY)]
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
            rows.append([f"*{label}*", "all", "0 %", *values, *right, ""])
    lines = ["| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([*lines, "", protocol(results)])


def protocol(results: list[dict[str, Any]]) -> str:
    one = results[0]
    generation, made = one["generation"], one["provenance"]
    pairs = one["metrics"]["psnr"]["n"]
    linears = ", ".join(f"{r['conversion']['converted']} with `{r['protect']['name']}`" for r in results)
    return (
        f"`quant={one['quant']['name']}` on {one['model']['name']}-wan, {pairs} (prompt, seed) pairs, mean and 95 % "
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
        for same in SAME:
            if pick(result, same) != pick(results[0], same):
                raise ValueError(f"{folder} differs from {folders[0]} in {same}: not one table")
    return results


def pick(result: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        result = result[key]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    args = parser.parse_args()
    try:
        results = read_sweep(args.sweep)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    text = args.readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_atomic(args.readme, f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
