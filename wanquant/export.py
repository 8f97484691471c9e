"""python -m wanquant.export <checkpoint> <target> --layout bf16|mindie-sd [--naming original]

A quantized checkpoint in the layout of another engine: see ``wanquant.wan.checkpoints.export``. Of a pipeline its
transformers are exported, each into its own folder; with ``bf16`` all else is copied, so that the target is a whole
pipeline again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wanquant import cli
from wanquant.runs.progress import announce
from wanquant.wan.checkpoints.names import LAYOUTS, NAMINGS


def main() -> None:
    parser = argparse.ArgumentParser(prog="wanquant export", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("checkpoint", type=Path, help="a quantized pipeline, or a quantized transformer's folder")
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--naming", choices=NAMINGS, default="diffusers", help="original: as Wan's authors call it")
    args = parser.parse_args()
    announce("export", str(args.target))
    from wanquant.wan.checkpoints.export import export_all

    try:
        export_all(args.checkpoint, args.target, args.layout, args.naming)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"exported: {args.target}")
    if args.layout == "mindie-sd":
        print("transformers alone: VAE, text encoder and configs are the original's; no engine is known to read HiF8")


if __name__ == "__main__":
    cli.main("export")
