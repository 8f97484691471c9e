"""python -m wanquant.export <checkpoint> <target> --layout bf16|mindie-sd [--naming original]

A quantized checkpoint in the layout of another engine: see ``wanquant.wan.export``. Of a pipeline its transformers are
exported, each into its own folder; with ``bf16`` all else is copied, so that the target is a whole pipeline again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from wanquant.runs.progress import progress
from wanquant.wan.checkpoint import quantization_of
from wanquant.wan.export import LAYOUTS, NAMINGS, export
from wanquant.wan.load import transformers_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wanquant.export", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("checkpoint", type=Path, help="a quantized pipeline, or a quantized transformer's folder")
    parser.add_argument("target", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--naming", choices=NAMINGS, default="diffusers", help="original: as Wan's authors call it")
    args = parser.parse_args()
    try:
        export_all(args.checkpoint, args.target, args.layout, args.naming)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"exported: {args.target}")
    if args.layout == "mindie-sd":
        print("transformers alone: VAE, text encoder and configs are the original's; no engine is known to read HiF8")


def export_all(checkpoint: Path, target: Path, layout: str, naming: str) -> None:
    """Whole or not at all."""
    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
    if (checkpoint / "checkpoint").is_dir():
        raise ValueError(f"{checkpoint} is a run: its checkpoint is {checkpoint / 'checkpoint'}")
    parts = transformers_of(checkpoint)
    files = sum(len(list(part.glob("*.safetensors"))) for part in parts.values()) if layout == "bf16" else len(parts)
    with progress("export", files, "file") as tick:
        if "" in parts:
            export(checkpoint, target, layout, naming, tick)
            return
        if target.exists():
            raise ValueError(f"{target} is there already: choose another folder, or remove it")
        plain = [name for name, part in parts.items() if quantization_of(part) is None]
        plain = plain if len(plain) < len(parts) else []  # of which nothing could be exported
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for name, part in parts.items():
                if layout == "bf16" and name in plain:
                    shutil.copytree(part, partial / name)
                else:
                    export(part, partial / name, layout, naming, tick)
            if layout == "bf16":
                _copy_others(checkpoint, partial, parts)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _copy_others(checkpoint: Path, target: Path, parts: Collection[str]) -> None:
    for path in checkpoint.iterdir():
        if path.is_dir() and path.name not in parts:
            shutil.copytree(path, target / path.name)
        elif path.is_file():
            shutil.copy2(path, target / path.name)


if __name__ == "__main__":
    main()
