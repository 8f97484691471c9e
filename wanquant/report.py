"""python -m wanquant.report outputs/ptq/<sweep>

One ranked table of a sweep, with intervals, verdicts and collapse gates: ``report.html`` in the sweep's directory, and
``table.md``, ``table.tex``, ``table.csv`` beside it. Can be run as often as one likes, while the sweep runs too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wanquant import cli
from wanquant.runs.progress import announce


def main() -> None:
    parser = argparse.ArgumentParser(prog="wanquant report", description="One ranked table of a sweep.")
    parser.add_argument("sweep", type=Path, help="its directory, which holds 0, 1, 2, ...")
    parser.add_argument("--reference", help="name of the configuration the others are compared with (default: job 0's)")
    parser.add_argument("--margin", type=float, help="dB within which two are equivalent (default: 0.5)")
    args = parser.parse_args()
    announce("report", str(args.sweep))
    from wanquant.evaluate.sweep.summary import MARGIN
    from wanquant.evaluate.sweep.tables import report, text
    from wanquant.plugins import load_plugins

    try:
        load_plugins()
        print(text(report(args.sweep, args.reference, MARGIN if args.margin is None else args.margin), args.sweep))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.main("report")
