"""Mirrors a finished run to Weights & Biases. Offline by default; never the only copy of anything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanquant.choices import choice


@dataclass
class TrackerConfig:
    """``name``: ``wandb`` or ``none``. ``mode``: ``offline`` writes beside the run, ``online`` uploads."""

    name: str = choice("wandb", ("wandb", "none"))
    mode: str = choice("offline", ("offline", "online"))
    project: str = "wanquant"


@contextmanager
def _only_warns(consolation: str) -> Iterator[None]:
    """Whatever a tracker's error is, hours of work are not lost to it."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).warning("%s, but the tracker failed: %s", consolation, error)


def mirror(config: TrackerConfig, folder: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Sends the settings, every metric with its interval, gates, timings, the contact sheet and the
    side-by-side videos of the finished run in ``folder``.

    The result is complete before this begins, so a tracker that fails is a warning, not the end of the run.
    """
    if config.name != "none":
        with _only_warns("the result is complete"), _run(config, folder, result["job"], settings) as run:
            _send(run, folder, result)


def mirror_table(config: TrackerConfig, folder: Path, summary: dict[str, Any]) -> None:
    """Sends the table of the finished sweep in ``folder``; a tracker that fails is a warning here too."""
    if config.name == "none" or not summary["rows"]:
        return
    with _only_warns("the table is complete"):
        import wandb

        # Here, since all commands import this module.
        from wanquant.runs.reports.sweep_table import cells
        from wanquant.runs.reports.table import no_formula

        heads, rows, floors = cells(summary)
        with _run(config, folder, "sweep", {"protocol": summary["protocol"]}) as run:
            data = [[no_formula(cell) for cell in row] for row in (*rows, *floors)]  # it is exported as CSV
            run.log({"ranking": wandb.Table(columns=heads, data=data)})


@contextmanager
def live(config: TrackerConfig, folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function for the rows of a training, each sent when it is given; a tracker that fails is a warning, once."""
    if config.name == "none":
        yield lambda row: None
        return
    broken: list[Exception] = []

    def attempt(send: Callable[[], Any]) -> Any:
        try:
            return None if broken else send()
        except Exception as error:  # as in ``mirror``
            broken.append(error)
            logging.getLogger(__name__).warning("the training goes on, but the tracker failed: %s", error)
            return None

    run = attempt(lambda: _run(config, folder, "training", settings))
    try:
        yield lambda row: attempt(lambda: run.log(_flat(row)))
    finally:
        attempt(lambda: run.finish())


def _flat(row: dict[str, Any], path: str = "") -> dict[str, Any]:
    """``{"grad_norms": {"blocks.0": 1}}`` as ``{"grad_norms/blocks.0": 1}``."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= _flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _run(config: TrackerConfig, folder: Path, group: str, settings: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(
        project=config.project,
        name=folder.name,
        group=group,
        dir=str(folder),
        config=settings,
        mode="online" if config.mode == "online" else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )


def _send(run: Any, folder: Path, result: dict[str, Any]) -> None:
    import wandb

    judged = {
        f"{key}/{name}": metric
        for key, entry in result.get("evaluations", {}).items()
        for name, metric in entry["metrics"].items()
    }
    for name, metric in {**result.get("metrics", {}), **judged}.items():
        low, high = metric["ci95"]
        run.summary[name] = {"mean": metric["mean"], "low": low, "high": high}
    for name, gate in result.get("gates", {}).items():
        run.summary[f"gate/{name}"] = gate["verdict"]
    run.summary.update({f"seconds/{name}": value for name, value in result["timings"].items()})
    sheet = folder / "figures" / "contact_sheet.png"
    if sheet.is_file():  # an analysis has no videos
        videos = sorted((folder / "videos" / "side_by_side").glob("*.mp4"))
        shown = {f"videos/{path.stem}": wandb.Video(str(path), format="mp4") for path in videos}
        run.log({"contact_sheet": wandb.Image(str(sheet)), **shown})
