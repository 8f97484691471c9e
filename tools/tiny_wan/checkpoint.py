"""Training state on disk: written to a temporary name and renamed, so a killed run resumes cleanly."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch


def save_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, **extra: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.pt.tmp"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **extra}, temporary)
    os.replace(temporary, folder / "state.pt")


def load_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the last checkpoint, if there is one, into place and returns the step to go on from (0 without)."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def log_row(path: Path, row: dict[str, float]) -> None:
    """Appends a line to a loss curve in CSV, with a header when the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
