"""python -m wanquant.export <checkpoint> <target> --layout bf16|comfyui|compressed-tensors|modelslim|mindie-sd

A quantized checkpoint in the layout of another engine: see ``wanquant.wan.checkpoints.export``. Of a pipeline its
transformers are exported, each into its own folder; with ``bf16``, ``compressed-tensors`` and ``modelslim`` all else
is copied, so that the target is a whole pipeline again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wanquant import cli
from wanquant.runs.progress import announce
from wanquant.wan.checkpoints.layouts import LAYOUTS, NAMINGS


def main() -> None:
    parser = argparse.ArgumentParser(prog="wanquant export", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("checkpoint", type=Path, help="a quantized pipeline, or a quantized transformer's folder")
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    naming = (
        "original: as Wan's authors call it; prefixed: that behind model.diffusion_model.; by default the layout's own"
    )
    parser.add_argument("--naming", choices=NAMINGS, help=naming)
    args = parser.parse_args()
    announce("export", str(args.target))
    from wanquant.wan.checkpoints.export import export_all

    try:
        said = export_all(args.checkpoint, args.target, args.layout, args.naming)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"exported: {args.target}", *said, sep="\n")


if __name__ == "__main__":
    cli.main("export")
