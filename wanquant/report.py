"""python -m wanquant.report outputs/ptq/<sweep>

One ranked table of a sweep, with intervals, verdicts and collapse gates: ``report.html`` in the sweep's directory, and
``table.md``, ``table.tex``, ``table.csv`` beside it. Can be run as often as one likes, while the sweep runs too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from wanquant.evaluate.sweep import MARGIN, summarize
from wanquant.runs.sweep_report import write_sweep
from wanquant.runs.sweep_table import cells


def report(sweep: Path, reference: str | None = None, margin: float = MARGIN) -> dict[str, Any]:
    """Writes the sweep's report and returns what is in it."""
    summary = summarize(sweep, reference, margin)
    write_sweep(sweep, summary)
    return summary


def text(summary: dict[str, Any], sweep: Path) -> str:
    """What the terminal shows: the table's most important columns, what failed, and where the report is."""
    lines = []
    if summary["rows"]:
        heads, rows, floors = cells(summary)
        kept = [place for place, head in enumerate(heads) if place < 2 or head in _shown(summary)]
        table = [[line[place] for place in kept] for line in (heads, *rows, *floors)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines += [f"caution: {caution}" for caution in summary["cautions"]]
    lines += [f"job {job['job']} failed ({job['name']}): {job['error']}" for job in summary["failed"]]
    if summary["unfinished"]:
        lines.append(f"not finished: job {', job '.join(map(str, summary['unfinished']))}")
    return "\n".join([*lines, f"report: {sweep / 'report.html'}"])


def _shown(summary: dict[str, Any]) -> tuple[str, ...]:
    return ("latent SQNR, dB", f"minus {summary['reference']}, dB", "verdict", "gates")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wanquant.report", description="One ranked table of a sweep.")
    parser.add_argument("sweep", type=Path, help="its directory, which holds 0, 1, 2, ...")
    parser.add_argument("--reference", help="name of the configuration the others are compared with (default: job 0's)")
    parser.add_argument("--margin", type=float, default=MARGIN, help="dB within which two are equivalent (default: 1)")
    args = parser.parse_args()
    try:
        print(text(report(args.sweep, args.reference, args.margin), args.sweep))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
