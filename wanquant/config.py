"""Where the library meets Hydra: the schemas, and what the scripts share.

The config dataclasses live beside the parts they configure; here they are registered as schemas,
so that a misspelt key or a wrong type fails when the config is composed. Only the scripts import
this module; only it and ``mistakes`` import Hydra.

Hydra prints its own errors over several lines, and a traceback for everybody else's. ``main`` has it let them through
instead, to be told in one line (``wanquant.mistakes``). Nothing heavy is imported before the config is known to be
good.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wanquant import interrupt
from wanquant.choices import did_you_mean
from wanquant.evaluate.config import EvaluateConfig
from wanquant.mistakes import USER_ERRORS, complain, one_line, ran_out_of_memory
from wanquant.plugins import load_plugins
from wanquant.ptq.config import PTQConfig
from wanquant.qat.train_config import TrainConfig
from wanquant.runs import launch
from wanquant.runs.files import write_atomic
from wanquant.runs.progress import announce
from wanquant.runs.run import VOLATILE, refused_leave_no_result, write_refusal
from wanquant.runs.tracking import TrackerConfig, mirror_table

#: Where the configs are written, and, in an installed package, where they were put.
FOLDERS = (Path(__file__).resolve().parent.parent / "conf", Path(__file__).resolve().parent / "conf")
CONF = str(next(folder for folder in reversed(FOLDERS) if (folder / "ptq.yaml").is_file()))
#: For the configs, which look for those of one program alone below it.
os.environ["WANQUANT_CONF"] = CONF
#: Keys that change no number by themselves, and yet another model.
MODEL = ("model.path", "model.base")
#: Each program's config, and the function that does the work: imported once the config is known to be good, for it
#: imports torch and much else.
SCHEMAS: dict[str, type] = {"ptq": PTQConfig, "train": TrainConfig, "eval": EvaluateConfig}
JOBS = {
    "ptq": ("wanquant.ptq.job", "run_ptq"),
    "train": ("wanquant.qat.job", "run_train"),
    "eval": ("wanquant.evaluate.job", "run_evaluate"),
}

# Hydra copies its store whole for each config it composes and each group that --help lists, which took 3 s. What is
# loaded from it is a copy anyway.
ConfigStore.__deepcopy__ = lambda self, _: self  # type: ignore[attr-defined]
for _program, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_program}_schema", node=_schema)


class Watch(Callback):
    """Hydra's word, in the process that launches, that a sweep begins: where, and with which tracker.

    A sweep's directory is that sweep's: what is finished there is kept, so other overrides have no place in it.
    """

    sweep: ClassVar[Path | None] = None
    tracker: ClassVar[TrackerConfig] = TrackerConfig()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if config.dry_run:
            return
        try:
            Watch.sweep = _begin_sweep(config)
            if "joblib" in config.hydra.launcher.get("_target_", ""):
                interrupt.shield_workers()
            Watch.tracker = TrackerConfig(**{str(key): value for key, value in config.tracker.items()})
            interrupt.advise(f"the same command with hydra.sweep.dir={Watch.sweep} goes on there")
        except Exception as error:  # Hydra would make a warning of it, and go on
            complain(error)
            sys.exit(1)


def _begin_sweep(config: DictConfig) -> Path:
    launcher = str(config.hydra.launcher.get("_target_", ""))
    if launch.processes() > 1 and not launcher.endswith(".BasicLauncher"):
        raise ValueError(f"{launch.processes()} processes share each job of a sweep: leave out hydra/launcher")
    folder = Path(config.hydra.sweep.dir)
    asked = sorted(override for override in config.hydra.overrides.task if not _changes_nothing(override))
    asked += [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    note = folder / "sweep.json"
    if note.is_file() and json.loads(note.read_text())["overrides"] != asked:
        raise ValueError(f"{folder} holds another sweep: choose another hydra.sweep.dir")
    write_atomic(note, json.dumps({"overrides": asked}, indent=2) + "\n")
    return folder


def _forget_if_empty(sweep: Path) -> None:
    """Of a sweep that was refused before its first job, so that the directory is free for the mended command."""
    notes = {sweep / "sweep.json", sweep / "multirun.yaml"}
    if set(sweep.iterdir()) <= notes:
        for note in notes:
            note.unlink(missing_ok=True)
        sweep.rmdir()


def _changes_nothing(override: str) -> bool:
    """An override that makes no other sweep of it."""
    key = override.lstrip("+~").split("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in VOLATILE if name not in MODEL)


def main(program: str) -> None:
    """Composes the config of ``program``, turns it into its dataclass and does its job in Hydra's run directory.

    In a multirun a job that fails does not take the others with it, whichever process it runs in; at the end there is
    one table. Exits 0 only when every job returned, 1 after an error, 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # "full" means: raised here, not printed there
    Watch.sweep = None
    failures: list[Exception] = []

    @hydra.main(config_path=CONF, config_name=program, version_base="1.3")
    def compose(raw: DictConfig) -> None:
        error = carry_out(raw, program)
        if error is not None:
            failures.append(error)

    try:
        with launch.unseen():
            compose()
    except KeyboardInterrupt:
        interrupt.tell()
        sys.exit(130)
    except USER_ERRORS as error:  # of Hydra, before there was a job
        if launch.first():
            complain(error, schema=SCHEMAS[program])
        if Watch.sweep is not None and launch.first():
            _forget_if_empty(Watch.sweep)
        sys.exit(1)
    finally:
        # After a defect of ours in one of the jobs, too: the others' results are there.
        told = Watch.sweep is None or not launch.first()
        complete = told or isinstance(sys.exception(), KeyboardInterrupt | SystemExit) or end_sweep()
    if failures or not complete:
        sys.exit(1)


def carry_out(raw: DictConfig, program: str) -> Exception | None:
    """One job, in whatever process Hydra runs it. A user's error is told here, and returned."""
    hydra_config = HydraConfig.get()
    # A launcher's worker may have been started somewhere else.
    home = Path(hydra_config.runtime.cwd)
    folder = home / hydra_config.runtime.output_dir
    several = hydra_config.mode == RunMode.MULTIRUN
    which = f"job {hydra_config.job.num}: " if several else ""
    _announce(program, which, folder, raw.dry_run, several)
    try:
        with launch.joined(hydra_config.job.num if several else 0, lambda error: one_line(error, SCHEMAS[program])):
            with contextlib.nullcontext() if raw.dry_run else refused_leave_no_result(folder):
                load_plugins()
                name_after_overrides(raw, list(hydra_config.overrides.task))
                config: Any = OmegaConf.to_object(raw)
                refuse_unknown_keys(raw, config)
                config.check()
                config.cache = str(home / config.cache)
            if launch.first() or not raw.dry_run:
                load_job(program)(config, folder, OmegaConf.to_yaml(raw, resolve=True))
    except Exception as error:
        if several and not raw.dry_run and not (folder / "result.json").is_file():  # else the run itself has told
            names = {
                group: {"name": str(raw[group].name)} for group in ("model", "quant", "protect", "qat") if group in raw
            }
            with contextlib.suppress(OSError, ValueError):  # a full disk, a folder that is not ours
                write_refusal(folder, program, OmegaConf.to_yaml(raw), names, one_line(error, SCHEMAS[program]))
        if not isinstance(error, (*USER_ERRORS, launch.FailedElsewhere)) and not ran_out_of_memory(error):
            raise
        # Told here and not outside, where Hydra would have added lines of its own.
        complain(error, which, SCHEMAS[program])
        return error
    finally:
        _remove_if_empty(folder)
    return None


def load_job(program: str) -> Callable[[Any, Path, str], Any]:
    """``job(config, run directory, yaml)``."""
    module, name = JOBS[program]
    if module not in sys.modules:
        # What is imported stays, and Python's searches for cycles take half a second each to go through it: none
        # meanwhile, and none through that afterwards.
        gc.disable()
        try:
            import_module(module)
        finally:
            gc.enable()
        gc.freeze()
    found: Callable[[Any, Path, str], Any] = getattr(sys.modules[module], name)
    return found


def _announce(program: str, which: str, folder: Path, dry_run: bool, several: bool) -> None:
    where = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    if not several and not dry_run:
        interrupt.advise(f"the same command with hydra.run.dir={where} goes on there")
    announce(program, f"{which}{'dry run' if dry_run else where}")


def end_sweep() -> bool:
    """Draws the sweep's report and sends its table to the tracker; True if no job failed and none is missing."""
    assert Watch.sweep is not None
    from wanquant.evaluate.sweep.summary import results_of
    from wanquant.evaluate.sweep.tables import report, text

    try:
        load_plugins()
        summary = report(Watch.sweep)
    except OSError as error:
        complain(error, "the table of the sweep: ")
        return False
    except ValueError as error:  # of analyses there is none, nor of what cannot be compared
        print(f"no table of this sweep: {one_line(error)}", file=sys.stderr)
        with contextlib.suppress(ValueError):
            return all(result["status"] == "ok" for result in results_of(Watch.sweep))
        return False
    print(text(summary, Watch.sweep), flush=True)
    mirror_table(Watch.tracker, Watch.sweep, summary)
    failed = summary["failed"]
    if len(summary["rows"]) + len(failed) > 1:  # again, since other jobs have written since
        for job in failed:
            complain(ValueError(job["error"]), f"job {job['job']}: ")
    return not failed and not summary["unfinished"] and not summary.get("not_judged")


def name_after_overrides(raw: DictConfig, overrides: list[str]) -> None:
    """A preset that was changed on the command line is no longer that preset: its name says what was changed.

    ``protect.blocks=[3,17]`` is named ``blocks=[3,17]`` and not after the preset whose blocks it replaced;
    another folder than tiny-wan's is named after the folder.
    """
    overrides = [override.lstrip("+") for override in overrides]
    if raw.model.name == "tiny" and raw.model.path != "tiny":
        raw.model.name = Path(raw.model.path).name
    added = ("model.outliers.", "model.lora=", "model.lora_fuse=")
    planted = [o.removeprefix("model.") for o in overrides if o.startswith(added)]
    raw.model.name = " ".join([raw.model.name, *planted])
    given = [o for o in overrides if o.startswith(("prompts.texts=", "prompts.file="))]
    if given and not any(o.startswith("prompts.name=") for o in overrides):
        raw.prompts.name = Path(raw.prompts.file).stem or "given"
    for group in (group for group in ("protect", "quant", "qat") if group in raw):
        changes = [o.removeprefix(f"{group}.") for o in overrides if o.startswith(f"{group}.")]
        if changes and not any(change.startswith("name=") for change in changes):
            replaced = group == "protect" and any(change.startswith("blocks=") for change in changes)
            raw[group].name = " ".join([*([] if replaced else [raw[group].name]), *changes])


def refuse_unknown_keys(raw: DictConfig, config: Any, path: str = "") -> None:
    """``ValueError`` names a key that ``+key=value`` added and no dataclass has: it would do nothing."""
    known = {field.name for field in fields(config)}
    for key, value in ((str(key), value) for key, value in raw.items_ex(resolve=False)):
        if key not in known:
            guess = did_you_mean(f"{path}{key}", [f"{path}{name}" for name in known])
            raise ValueError(f"unknown key {path}{key}: no part of the program reads it. {guess}".rstrip())
        if isinstance(value, DictConfig) and is_dataclass(getattr(config, key)):
            refuse_unknown_keys(value, getattr(config, key), f"{path}{key}.")


def _remove_if_empty(folder: Path) -> None:
    """A dry run, or a job refused before it began, leaves a directory with an empty log: take those two away again,
    with the directories above that Hydra made for it; in a directory of somebody else's the log alone."""
    log = folder / "log.txt"
    if not log.is_file() or log.stat().st_size or (folder / "config.yaml").is_file():
        return
    log.unlink()
    if any(folder.iterdir()):
        return
    folder.rmdir()
    for parent in folder.parents:
        if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()) or any(parent.iterdir()):
            return
        parent.rmdir()
