"""A sweep's table in every form, and its report."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import forked
from tests.evaluate.results import METRIC, changed, named, shifted, sweep
from wanquant.evaluate.sweep import tables as report
from wanquant.evaluate.sweep.summary import summarize
from wanquant.runs import pictures
from wanquant.runs.reports import sweep_table
from wanquant.runs.reports.columns import FURTHER, estimate_text
from wanquant.runs.reports.table import Table, latex, markdown
from wanquant.runs.run import Run

STATIC = {"granularity": "per_tensor", "rule": "p99.99/15", "static": True}


def test_cells_hold_each_run_and_the_floor(tmp_path: Path) -> None:
    protected = {"protect.blocks": [0, 39], "protect.modules": ["ffn.net.2"], "metrics.step_sqnr": shifted(0.5)}
    gates = {"gates.static.verdict": "fail"}
    summary = summarize(
        sweep(tmp_path, named("ends", **protected), named("odd", **{"conversion.converted": 380, **gates}))
    )
    heads, rows, floors = sweep_table.cells(summary)
    table = [dict(zip(heads, row, strict=True)) for row in rows + floors]
    assert [row["protect"] for row in table] == ["ends", "none", "odd", "BF16, noise perturbed by 1 ulp"]
    assert table[0]["in BF16"] == "0, 39; ffn.net.2"
    assert table[0]["rank"] == "1"
    assert (table[1]["rank"], table[2]["rank"]) == ("2", "–")
    assert table[0]["minus none, dB"] == "0.500 [0.500, 0.500]"
    assert table[0]["pairs to tell"] == "1"
    assert table[0]["single steps, SQNR, dB"] != table[1]["single steps, SQNR, dB"]
    assert table[2]["gates"] == "FAILED: static"
    assert table[3]["latent SQNR, dB"] == table[1]["latent SQNR, dB"]
    text = sweep_table.protocol(summary)
    assert "quant=hif8_w8a8 on tiny: 24 (prompt, seed) pairs" in text
    assert "380 to 400 linears" in text
    lines = markdown(heads, rows, floors).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("|  | *BF16, noise perturbed by 1 ulp* |")
    assert all(line.count("|") == len(heads) + 1 for line in lines)


def judged(by: float, **told: Any) -> dict[str, Any]:
    """What ``eval.py`` joins to a result: a dimension of which BF16 has the pairs of ``METRIC``."""
    scores = {"vbench.temporal_flickering": shifted(by), "difference.vbench.temporal_flickering": shifted(by - 20)}
    floors = {"bf16.vbench.temporal_flickering": shifted(0.0), "floor_ulp.vbench.temporal_flickering": shifted(-19.9)}
    notes = {"version": "0", "dimensions": ["temporal_flickering"], "long": 0, "foreign_weights": False}
    notes |= {"weights": {}, "reader": "decord", "device": "cpu", **told}
    return {"evaluations": {"own": {"metrics": {**scores, **floors}, "vbench": notes}}}


def test_vbench_beside_bf16_and_the_reference(tmp_path: Path) -> None:
    """What notices a collapse is there, measured or not."""
    summary = summarize(sweep(tmp_path, named("x", **judged(1.0)), named("y", **judged(0.5))))
    _, rows, _ = sweep_table.vbench_cells(summary)
    assert {row[0]: row[1] for row in rows}["none"] == "not judged"
    for job, by in ((0, 0.0), (1, 1.0), (2, 0.5)):
        path = tmp_path / str(job) / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **judged(by, long=3)}))
    summary = summarize(tmp_path)
    heads, rows, floors = sweep_table.vbench_cells(summary)
    assert heads == [
        "protect", "temporal_flickering", "minus BF16", "minus none",
        "imaging_quality", "dynamic_degree", "overall_consistency",
    ]  # fmt: skip
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["x"][2] == "1.00000 [1.00000, 1.00000]"
    assert by_name["none"][2] == ""
    assert by_name["y"][3:] == ["not measured"] * 3
    assert [row[:3] for row in floors] == [
        ["BF16", estimate_text(METRIC, 5), ""],
        ["BF16, noise perturbed by 1 ulp", "", estimate_text(shifted(-19.9), 5)],
    ]
    assert not summary["cautions"]
    report.report(tmp_path)
    assert "3 videos of each configuration last 5.0 s or more" in (tmp_path / "report.html").read_text()
    text = (tmp_path / "table.md").read_text().split("imaging_quality")[1]
    assert "| y | " in text
    assert "| *BF16, noise perturbed by 1 ulp* | " in text
    rung = next(rung for rung in summary["ladder"]["rungs"] if rung["name"] == "vbench.temporal_flickering")
    assert rung["correlations"]["step_sqnr"] is None  # all three have the same


def test_runs_judged_otherwise_or_not_at_all_are_said(tmp_path: Path) -> None:
    other = {**judged(1.0, reader="av"), "not_judged": "out of luck"}
    summary = summarize(sweep(tmp_path, named("x", **judged(0.0)), named("y", **other)))
    assert summary["cautions"] == [
        "VBench did not judge all runs by the same reader", "job 2 was not judged: out of luck"
    ]  # fmt: skip
    assert summary["not_judged"] == [[2, "out of luck"]]


def test_quantizations_are_told_by_their_scales(tmp_path: Path) -> None:
    changes = {"quant.name": "percentile", "quant.activations": STATIC, "quant.smoothing": 0.5, "model.batch": 1}
    heads, rows, _ = sweep_table.cells(summarize(sweep(tmp_path, changes)))
    found = dict(zip(heads, rows[1], strict=True))
    assert found["quant"] == "percentile (videos one at a time)"
    assert found["weights"] == "per channel, amax/15"
    assert found["activations"] == "static per tensor, p99.99/15, smoothed 0.5"
    assert "in BF16" not in heads


def test_methods_and_bits_are_told(tmp_path: Path) -> None:
    first = sweep(tmp_path, {"quant.name": "svd", "quant.low_rank": 32, "quant.rotation": 64, "bits_per_weight": 6.25})
    result = json.loads((first / "0" / "result.json").read_text())
    result |= {"bits_per_weight": 4.5}
    result["quant"]["weights"]["feedback"] = True
    result["quant"]["activations"]["format"] = "bf16"
    (first / "0" / "result.json").write_text(json.dumps(result))
    heads, rows, _ = sweep_table.cells(summarize(first))
    found = {row[1]: dict(zip(heads, row, strict=True)) for row in rows}
    assert found["hif8_w8a8"]["weights"] == "per channel, amax/15, error feedback"
    assert found["hif8_w8a8"]["activations"] == "BF16"
    assert found["svd"]["weights"] == "per channel, amax/15, rank 32 beside it"
    assert found["svd"]["activations"] == "per token, amax/15, rotated by 64"
    assert [found[name]["bits a weight"] for name in ("hif8_w8a8", "svd")] == ["4.50", "6.25"]


def test_latex_and_markdown_escape_what_they_must() -> None:
    heads, rows, floors = ["a_b", "c"], [["1–4 % & ~", "x|y"]], [["", r"attn[12]\..*"]]
    text = latex(heads, rows, floors)
    assert r"a\_b & c \\" in text
    assert r"1--4 \% \& \textasciitilde{} & x|y \\" in text
    assert text.splitlines()[5:7] == [r"\midrule", r" & attn[12]\textbackslash{}..* \\"]
    lines = markdown(heads, rows, floors).splitlines()
    assert lines[2:] == [r"| 1–4 % & ~ | x\|y |", r"|  | *attn[12]\\..\** |"]


#: What would be markup, a formula, or another row, somewhere.
NASTY = (
    "<script>alert('x')</script> & \"quoted\" --> `code`",
    "two\nlines | a *star* \\ $\\frac{1}{2$ and",
    '=HYPERLINK("http://x"), @SUM(1) [a](javascript:x)',
)


def test_prompts_and_names_of_any_letters_are_text_everywhere(tmp_path: Path) -> None:
    items = dict(zip(("a", "b", "c"), NASTY, strict=True))
    change: dict[str, Any] = {"protect.name": NASTY[2], "model.name": NASTY[0]}
    for name in ("step_sqnr", "psnr"):
        per_item = [{**item, "prompt": items[item["prompt"]]} for item in METRIC["per_item"]]
        change[f"metrics.{name}"] = {**METRIC, "per_item": per_item}
    folder = sweep(tmp_path, {**change, "protect.name": NASTY[1]}, change)
    (folder / "0" / "result.json").write_text(json.dumps(changed({**change, "protect.name": "+1"})))
    report.report(folder)
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)" in page
    lines = (folder / "table.md").read_text().split("\n\n")[0].splitlines()
    assert len(lines) == 6
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert {len(line) for line in cells} == {len(cells[0])}
    told = [line[1].strip() for line in cells[2:]]
    assert r'=HYPERLINK("http://x"), @SUM(1) \[a](javascript:x)' in told
    assert r"two lines \| a \*star\* \\ \$\\frac{1}{2\$ and" in told
    assert "<script>" not in (folder / "table.md").read_text().replace(r"\<script>", "")
    assert len((folder / "table.tex").read_text().splitlines()) == 11
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert {row["name"] for row in rows} >= {"'+1", f"'{NASTY[2]}", NASTY[1]}
    assert not any(str(value).startswith(("=", "+", "@")) for row in rows for value in row.values())


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert Table(["a", "n"], [["long", "10"]], [["x", "5"]]).lines(right=[1]) == ["a      n", "long  10", "x      5"]
    assert Table([], []).lines() == []


def test_a_metric_added_from_outside_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FURTHER, "sharpness", ("sharpness", "lines"))
    row = {"name": "x", "metrics": {"sharpness": METRIC}}
    found = sweep_table.further_cells({"by": ["protect"], "rows": [row]})
    assert found == (["protect", "sharpness, lines"], [["x", estimate_text(METRIC)]], ())


def write_videos(folder: Path, jobs: int) -> None:
    rng = np.random.default_rng(0)
    for job in range(jobs):
        for kind in ("bf16", "quantized"):
            for place, item in enumerate(METRIC["per_item"]):
                frames = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
                path = folder / str(job) / "videos" / kind / f"{place:03d}-seed{item['seed']}.mp4"
                pictures.write_mp4(path, frames, 8)


def test_the_report_is_one_file_the_same_each_time_and_complete(tmp_path: Path) -> None:
    """While a job still runs, too."""
    fewer = named("y", **{"protect.fraction_of_flops_quantized": 0.8})
    folder = sweep(tmp_path / "s", named("x", **{"metrics.step_sqnr": shifted(1.0)}), fewer)
    write_videos(folder, 3)
    Run(folder / "3", "ptq", "", {"protect": {"name": "w"}}).fail(ValueError("out of <luck>"))
    (folder / "4").mkdir()
    done = forked.run(["-m", "wanquant.report", str(folder)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].startswith("1 ")
    assert "job 3 failed (w): ValueError: out of <luck>" in done.stdout
    assert "not finished: job 4" in done.stdout
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert written.keys() == {"report.html", "table.md", "table.tex", "table.csv"}
    html = written["report.html"].decode()
    assert html.count("<video") == 3
    # The controls are beneath each picture, and small ones are enlarged without smoothing.
    assert html.count('</video>\n<div class="controls"') == 3
    assert "video { width: 100%; height: auto; image-rendering: pixelated;" in html
    assert html.count("<script>") == 1
    assert html.count("<svg") == 4
    assert "out of &lt;luck&gt;" in html
    assert "not finished yet" in html
    assert "Which measure could be spared?" in html
    assert 'src="http' not in html
    assert 'href="http' not in html.replace('xlink:href="http', "")
    assert len(html) < 20e6
    numbers = list(csv.DictReader(written["table.csv"].decode().splitlines()))
    floors = ["BF16, noise perturbed by 1 ulp", "BF16, another seed"]
    assert [row["name"] for row in numbers] == ["x", "none", "y", "w", *floors]
    assert numbers[3]["verdict"] == "job failed"
    assert "w (job 3) |" in written["table.md"].decode()
    assert float(numbers[0]["minus_reference"]) == 1.0
    assert float(numbers[1]["latent_sqnr"]) == METRIC["mean"]
    report.report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == written


def test_large_videos_do_not_make_a_large_report(tmp_path: Path) -> None:
    """Panels of 192 lines, and no more films than fit."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 480, 832, 3), dtype=np.uint8)
    row = pictures.side_by_side([noise] * 5, list("abcde"), columns=4, height=192)
    assert row.shape[1] == 2 * (192 + pictures.LABEL_HEIGHT)
    assert row.shape[2] == 4 * 333 + 3 * 8
    pictures.write_mp4(tmp_path / "x.mp4", row, 8)
    assert pictures.read_mp4(tmp_path / "x.mp4").shape == row.shape


def test_a_sweep_in_which_all_failed_has_a_report(tmp_path: Path) -> None:
    Run(tmp_path / "0", "ptq", "").fail(ValueError("no"))
    summary = report.report(tmp_path)
    assert summary["rows"] == []
    assert "Job 0 failed" in (tmp_path / "report.html").read_text()
    assert report.text(summary, tmp_path).splitlines()[0] == "job 0 failed (unknown): ValueError: no"


def test_what_is_no_sweep_is_one_line(tmp_path: Path) -> None:
    done = forked.run(["-m", "wanquant.report", str(tmp_path / "nowhere")])
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path / 'nowhere'} holds no runs of a sweep"


def test_json_of_a_summary_is_plain(tmp_path: Path) -> None:
    summary = summarize(sweep(tmp_path, named("x")))
    assert json.loads(json.dumps(summary)) == summary
