"""Training state on disk: written to a temporary name and renamed, so a killed run resumes cleanly."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch


def save_state(
    folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, recipe: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.pt.tmp"
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save({**state, "step": step, "recipe": recipe}, temporary)
    os.replace(temporary, folder / "state.pt")


def load_state(folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: str) -> int:
    """Puts the last checkpoint, if there is one, into place and returns the step to go on from (0 without).

    Loss curves lose what was logged behind that step. A checkpoint of another recipe is refused.
    """
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise SystemExit(f"{path} was made by another recipe: {state['recipe']}, not {recipe}. Use another --out.")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    step = int(state["step"])
    for curve in folder.glob("*.csv"):
        header, *rows = curve.read_text().splitlines()
        kept = [header, *(row for row in rows if int(row.split(",")[0]) < step)]
        curve.write_text("\n".join(kept) + "\n")
    return step


def log_row(path: Path, row: dict[str, float]) -> None:
    """Appends a line to a loss curve in CSV, its first column the step, with a header when the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
