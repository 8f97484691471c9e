"""python -m wanquant.doctor          what is installed, which weights are there, and what to do about what is not
python -m wanquant.doctor fetch    gets the weights that are missing, where there is a network

Weights go where VBench looks for them, ``VBENCH_CACHE_DIR`` or ``~/.cache/vbench``, and torch, ``TORCH_HOME`` or
``~/.cache/torch``: carry these two folders to a machine that has no network. Nothing else in wanquant fetches them.
"""

from __future__ import annotations

import argparse
import sys

from wanquant import cli
from wanquant.runs.progress import announce


def main() -> None:
    parser = argparse.ArgumentParser(prog="wanquant doctor", description="What is installed, and what is not.")
    parser.add_argument("command", nargs="?", choices=("fetch",), help="get the missing weights")
    parser.add_argument("dimensions", nargs="*", help="of these dimensions of VBench, lpips or raft (default: all)")
    args = parser.parse_args()
    announce("doctor")
    from wanquant.evaluate.judges.examine import examine, fetch

    try:
        if args.command == "fetch":
            sys.exit(0 if fetch(args.dimensions) else 1)
        print("\n".join(examine()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.main("doctor")
