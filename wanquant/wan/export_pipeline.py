"""A whole quantized pipeline in another engine's layout: its transformers one by one, the rest copied."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from wanquant.runs.progress import progress
from wanquant.wan.checkpoint import quantization_of
from wanquant.wan.export import export
from wanquant.wan.load import transformers_of


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
