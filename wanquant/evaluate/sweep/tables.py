"""A sweep's one table: written, and as the terminal shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanquant.evaluate.sweep.summary import MARGIN, summarize
from wanquant.runs.reports.columns import DRIFT, STEP_SQNR, head
from wanquant.runs.reports.sweep import write_sweep
from wanquant.runs.reports.sweep_table import OVER_UNTRAINED, OVER_UNTRAINED_DRIFT, cells, vbench_cells
from wanquant.runs.reports.table import Table

#: Columns that the terminal shows, besides the first two and the difference from the reference.
SHOWN = (
    *(head(name) for name in (STEP_SQNR, DRIFT)),
    *("verdict", "gates", OVER_UNTRAINED, "against its baseline", OVER_UNTRAINED_DRIFT),
)


def report(sweep: Path, reference: str | None = None, margin: float = MARGIN) -> dict[str, Any]:
    """Writes the sweep's report and returns what is in it."""
    summary = summarize(sweep, reference, margin)
    write_sweep(sweep, summary)
    return summary


def text(summary: dict[str, Any], sweep: Path) -> str:
    """What the terminal shows: the table's most important columns, what failed, and where the report is."""
    lines = []
    if summary["rows"]:
        table = cells(summary)
        shown = {*SHOWN, f"minus {summary['reference']}, dB"}
        kept = [place for place, head in enumerate(table[0]) if place < 2 or head in shown]
        heads, rows, floors = ([[line[place] for place in kept] for line in part] for part in ([table[0]], *table[1:]))
        lines = Table(heads[0], rows, floors).lines() + vbench_cells(summary).lines()
        lines += [f"caution: {caution}" for caution in summary["cautions"]]
    lines += [f"job {job['job']} failed ({job['name']}): {job['error']}" for job in summary["failed"]]
    if summary["unfinished"]:
        lines.append(f"not finished: job {', job '.join(map(str, summary['unfinished']))}")
    return "\n".join([*lines, f"report: {sweep / 'report.html'}"])
