"""Writes the table of a sweep into a Markdown file, between the markers of its name.

python ptq.py experiment=protection hydra.sweep.dir=outputs/ptq/protection
python tools/write_table.py outputs/ptq/protection protection-tiny README.md

The table is that of ``python -m wanquant.report``, of a sweep in which every job has finished. The directory of a run
with ``mode=analyze`` gives the table of its blocks instead, and ``--trainings`` that of trainings beside PTQ. In place
of a directory, what ``tools/keep_results.py`` packed of one.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanquant.evaluate.stats import Item, compared, difference
from wanquant.evaluate.sweep.names import settings_below
from wanquant.evaluate.sweep.summary import METRIC, jobs_of, summarize
from wanquant.runs.files import write_atomic
from wanquant.runs.reports.columns import DRIFT, estimate_text, short
from wanquant.runs.reports.sweep_table import cells, further_markdown, protocol
from wanquant.runs.reports.table import markdown
from wanquant.runs.run import read_result


def table_of_blocks(result: dict[str, Any]) -> str:
    """Markdown: a row a block, from the most sensitive to the least."""
    blocks, sensitive = result["analysis"]["blocks"], "sensitivity" in result["analysis"]["blocks"][0]
    order = "sensitivity" if sensitive else "block_sqnr"
    heads = ["block", *(["SQNR of single steps, dB"] if sensitive else []), "SQNR of its own output, dB"]
    heads += ["largest magnitude behind it", "largest that enters its linears", "fewer than 3 mantissa bits"]
    rows = []
    for row in sorted(blocks, key=lambda row: (row[order] is not None, row[order])):
        measured = ["sensitivity", "block_sqnr"] if sensitive else ["block_sqnr"]
        texts = [estimate_text({"mean": row[m], "ci95": [row[f"{m}_low"], row[f"{m}_high"]]}) for m in measured]
        share = f"{100 * row['few_bits']:.1f} %"
        rows.append([str(row["block"]), *texts, short(row["residual_absmax"]), short(row["input_absmax"]), share])
    made, quant, counted = result["provenance"], result["quant"]["name"], result["calibration"]
    correlations = [
        f"{row['meaning']}: {short(row['spearman'])} [{short(row['ci95'][0])}, {short(row['ci95'][1])}]"
        for row in result["analysis"]["correlation"]
    ]
    told = [f"Rank correlation with the harm to single steps: {'; '.join(correlations)}."] if correlations else []
    measured_on = (
        f"{result['model']['name']}, each block quantized alone (`quant={quant}`), {counted['pairs']} (prompt, seed) "
        f"pairs, mean and 95 % bootstrap interval clustered by prompt. {_machine(made)}."
    )
    return "\n".join([markdown(heads, rows), "", measured_on, *(["", *told] if told else [])])


def _machine(made: dict[str, Any]) -> str:
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    prompts = made["prompt_hash"][:12]
    return f"{made['device'].upper()}, {threads}, torch {made['packages']['torch']}, prompts {prompts}"


def table_of_sweep(sweep: Path, reference: str | None = None, further: bool = False) -> str:
    """Markdown of a sweep in which every job has finished, and how it was measured; or, ``further``, how its errors
    look, VBench's means, and the rank correlations of cheap measures."""
    summary = summarize(sweep, reference)
    for job in summary["failed"]:
        raise ValueError(f"{sweep / str(job['job'])} failed: {job['error']}")
    if summary["unfinished"]:
        raise ValueError(f"{sweep / str(summary['unfinished'][0])} holds no result.json: the run was not finished")
    if summary["demonstration"]:
        raise ValueError(f"{sweep} has too few (prompt, seed) pairs for a table")
    if not further:
        return markdown(*cells(summary)) + "\n\n" + protocol(summary)
    tables = further_markdown(summary)
    if not tables:
        raise ValueError(f"{sweep} measured nothing further: no videos, no blocks alone, no VBench")
    return "\n\n".join([*tables, protocol(summary)])


#: What trainings are compared with their PTQ baselines by, and what it is called.
COMPARED = (
    (METRIC, "single steps", "of single steps along BF16's trajectories"),
    (DRIFT, "final latents", "of the final latents"),
)


def table_of_trainings(sweep: Path) -> str:
    """Markdown: every recipe of a training against its PTQ baselines, in each setting."""
    table_of_sweep(sweep)  # refuses what is not whole, or not to be compared
    results = [read_result(folder) for folder in jobs_of(sweep)]
    trainings = list(zip(results, recipes_of(results), strict=True))
    known = [metric for metric in COMPARED if all(metric[0] in result["metrics"] for result in results)]
    recipes, settings = ({name for _, name in trainings}, {_setting(result) for result in results})
    make = _by_recipe if len(recipes) > 1 else _by_setting
    tables = [make(trainings, name, title) for name, title, _ in known]
    pairs, seeds = len(over_untrained(results[0], METRIC)), {result["qat"].get("seed", 0) for result in results}
    among = f"{len(recipes)} recipes of a column" if len(recipes) > 1 else f"{len(settings)} settings"
    wide = f"interval over prompts, so wide that 95 % is for all {among} together (Bonferroni)"
    if len(recipes) == len(settings) == 1:
        wide = "95 % interval over prompts"
    repeated = (
        f" Each was trained {len(seeds)} times (`qat.seed`), and each pair's difference is the mean of these; in "
        f"parentheses the lowest and the highest mean of one training."
    )
    told = (
        f"Trained less its PTQ baseline, in dB of SQNR: {', and '.join(what for *_, what in known)}. "
        f"{pairs} (prompt, seed) pairs, paired, Student's {wide}.{repeated if len(seeds) > 1 else ''} "
        f"{results[0]['model']['name']}, {_machine(results[0]['provenance'])}."
    )
    return "\n\n".join([*tables, told])


def recipes_of(results: list[dict[str, Any]]) -> list[str]:
    """Of each result the recipe's name, with the settings by which one of the name differs but for the seed, which a
    sweep over seeds puts into it."""
    names, found = [re.sub(r" seed=\d+\b", "", result["qat"]["name"]) for result in results], []
    flat = [dict(settings_below(result["qat"], "")) for result in results]
    for name, own in zip(names, flat, strict=True):
        alike = [each for other, each in zip(names, flat, strict=True) if other == name]
        varied = [
            key for key in own if key not in (".seed", ".name") and any(each.get(key) != own[key] for each in alike)
        ]
        found.append(" ".join([name, *(f"{key[1:]}={own[key]}" for key in varied)]))
    return found


#: A result and its recipe's name.
Training = tuple[dict[str, Any], str]
#: What a training gained, pair by pair, by its recipe, its setting and its seed.
Gained = dict[tuple[str, tuple[str, str], int], list[Item]]


def _gained(trainings: list[Training], name: str) -> Gained:
    gained: Gained = {}
    for result, recipe in trainings:
        key = recipe, _setting(result), result["qat"].get("seed", 0)
        if key in gained:
            raise ValueError(f"qat={recipe} stands twice in one setting")
        gained[key] = over_untrained(result, name)
    recipes, settings, seeds = ({key[part] for key in gained} for part in range(3))
    for recipe in recipes:
        if any((recipe, setting, seed) not in gained for setting in settings for seed in seeds):
            raise ValueError(f"qat={recipe} was not run in every setting")
    return gained


def _by_recipe(trainings: list[Training], name: str, title: str) -> str:
    """A row a recipe, a column a setting, and one over all settings."""
    gained = _gained(trainings, name)
    settings = list(dict.fromkeys(_setting(result) for result, _ in trainings))
    recipes = list(dict.fromkeys(recipe for _, recipe in trainings))
    seeds = sorted({seed for *_, seed in gained})
    several = len(settings) > 1
    heads = [f"{title}: qat", *(f"{quant}, protect {protect}" for quant, protect in settings)]
    heads += ["over all"] if several else []
    untrained = {_setting(result): result["metrics"][f"untrained.{name}"] for result, _ in trainings}
    rows = [["PTQ baseline itself", *(estimate_text(untrained[setting]) for setting in settings)]]
    rows[0] += [""] if several else []
    for recipe in recipes:
        own = [[gained[recipe, setting, seed] for seed in seeds] for setting in settings]
        if several:
            own.append([[item for setting in own for item in setting[seed]] for seed in range(len(seeds))])
        rows.append([recipe, *(_over(trained, len(recipes)) for trained in own)])
    return markdown(heads, rows)


def _over(trained: list[list[Item]], comparisons: int) -> str:
    """What trainings of several seeds gained, together and, behind it, from the least to the most."""
    text = estimate_text(compared(pooled(trained), comparisons).as_json())
    means = [statistics.fmean(item.value for item in items) for items in trained]
    return f"{text} ({min(means):.2f} to {max(means):.2f})" if len(trained) > 1 else text


def _by_setting(trainings: list[Training], name: str, title: str) -> str:
    """Of one recipe a row a setting."""
    gained, [recipe] = _gained(trainings, name), {recipe for _, recipe in trainings}
    untrained = {_setting(result): result["metrics"][f"untrained.{name}"] for result, _ in trainings}
    seeds = sorted({seed for *_, seed in gained})
    heads = [f"{title}: quant", "protect", "PTQ baseline itself", f"{recipe}, over it"]
    rows = [
        [
            *setting,
            estimate_text(of_ptq),
            _over([gained[recipe, setting, seed] for seed in seeds], len(untrained)),
        ]
        for setting, of_ptq in untrained.items()
    ]
    return markdown(heads, rows)


def _setting(result: dict[str, Any]) -> tuple[str, str]:
    return result["quant"]["name"], result["protect"]["name"]


def over_untrained(result: dict[str, Any], name: str) -> list[Item]:
    """Pair by pair."""
    own, untrained = (
        [Item(**item) for item in result["metrics"][key]["per_item"]] for key in (name, f"untrained.{name}")
    )
    return difference(own, untrained)


def pooled(parts: Iterable[list[Item]]) -> list[Item]:
    """The mean of each pair over the parts."""
    found: dict[tuple[str, int], list[float]] = {}
    for items in parts:
        for item in items:
            found.setdefault((item.prompt, item.seed), []).append(item.value)
    return [Item(*pair, statistics.fmean(values)) for pair, values in found.items()]


@contextmanager
def unpacked(source: Path) -> Iterator[Path]:
    """A directory as it is, or for as long as this lasts what an archive holds of one."""
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(source) as tar:
        tar.extractall(folder, filter="data")
        yield Path(folder)


def write(source: Path, reference: str | None = None, further: bool = False, trainings: bool = False) -> str:
    """The table of a sweep, or of an analysis."""
    with unpacked(source) as directory:
        return _write(directory, reference, further, trainings)


def _write(directory: Path, reference: str | None, further: bool, trainings: bool) -> str:
    if trainings:
        return table_of_trainings(directory)
    if not (directory / "result.json").is_file():
        return table_of_sweep(directory, reference, further)
    result = read_result(directory)
    if result["status"] != "ok" or result.get("mode") != "analyze":
        raise ValueError(f"{directory} is one run, and not a finished analysis: a table takes a sweep of several")
    return table_of_blocks(result)


def replace_table(text: str, name: str, new: str) -> str:
    """``text`` with ``new`` between the markers of that name; ``ValueError`` unless it has them once, in order."""
    begin, end = f"<!-- table {name}: begin -->", f"<!-- table {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin} and {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="directory of a sweep or of a run with mode=analyze, or its archive")
    parser.add_argument("name", help="of the markers: <!-- table NAME: begin --> and <!-- table NAME: end -->")
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", help="configuration the others are compared with (default: the first)")
    parser.add_argument("--further", action="store_true", help="how errors look, VBench, and rank correlations instead")
    parser.add_argument(
        "--trainings", action="store_true", help="of trainings: each recipe against its PTQ baselines instead"
    )
    args = parser.parse_args()
    try:
        table = write(args.source, args.reference, args.further, args.trainings)
        write_atomic(args.file, replace_table(args.file.read_text(), args.name, table))
    except (ValueError, OSError, tarfile.TarError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
