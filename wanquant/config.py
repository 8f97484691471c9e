"""Where the library meets Hydra: the schemas, and what the scripts share.

The config dataclasses live beside the parts they configure; here they are registered as schemas,
so that a misspelt key or a wrong type fails when the config is composed. Only the scripts import
this module, and only it and they import Hydra.

Hydra prints its own errors over several lines, and a traceback for everybody else's. ``main`` has
it let them through instead, and cuts what arrives down to one line: what is wrong, where, what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wanquant.evaluate.config import EvaluateConfig
from wanquant.evaluate.sweep import results_of
from wanquant.evaluate.tables import report, text
from wanquant.ptq.config import PTQConfig
from wanquant.qat.config import TrainConfig
from wanquant.runs.files import write_atomic
from wanquant.runs.run import VOLATILE, refused_leave_no_result, write_refusal
from wanquant.runs.tracking import TrackerConfig, mirror_table
from wanquant.wan.device import out_of_memory

CONF = str(Path(__file__).resolve().parent.parent / "conf")


ConfigStore.instance().store(name="ptq_schema", node=PTQConfig)
ConfigStore.instance().store(name="train_schema", node=TrainConfig)
ConfigStore.instance().store(name="eval_schema", node=EvaluateConfig)


#: What a user can mend. Whatever else is raised is a defect of ours and keeps its traceback.
USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    OSError,
)


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
            Watch.tracker = TrackerConfig(**{str(key): value for key, value in config.tracker.items()})
        except Exception as error:  # Hydra would make a warning of it, and go on
            _complain(error)
            sys.exit(1)


def _begin_sweep(config: DictConfig) -> Path:
    folder = Path(config.hydra.sweep.dir)
    asked = sorted(override for override in config.hydra.overrides.task if not _changes_nothing(override))
    asked += [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    note = folder / "sweep.json"
    if note.is_file() and json.loads(note.read_text())["overrides"] != asked:
        raise ValueError(f"{folder} holds another sweep: choose another hydra.sweep.dir")
    write_atomic(note, json.dumps({"overrides": asked}, indent=2) + "\n")
    return folder


def _changes_nothing(override: str) -> bool:
    """An override that makes no other sweep of it."""
    key = override.lstrip("+~").split("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in VOLATILE if name != "model.path")


def main(config_name: str, job: Callable[[Any, Path, str], Any]) -> None:
    """Composes ``config_name``, turns it into its dataclass and calls ``job(config, run directory, yaml)``.

    In a multirun a job that fails does not take the others with it, whichever process it runs in; at the end there is
    one table. Exits 0 only when every job returned, 1 after an error, 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # "full" means: raised here, not printed there
    Watch.sweep = None
    failures: list[Exception] = []

    @hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")
    def compose(raw: DictConfig) -> None:
        error = carry_out(raw, config_name, job)
        if error is not None:
            failures.append(error)

    # So that `kill` ends a run as an interrupt does, through its clean-up.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        compose()
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on there", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:  # of Hydra, before there was a job
        _complain(error)
        sys.exit(1)
    finally:
        # After a defect of ours in one of the jobs, too: the others' results are there.
        complete = Watch.sweep is None or isinstance(sys.exception(), KeyboardInterrupt | SystemExit) or end_sweep()
    if failures or not complete:
        sys.exit(1)


def carry_out(raw: DictConfig, config_name: str, job: Callable[[Any, Path, str], Any]) -> Exception | None:
    """One job, in whatever process Hydra runs it. A user's error is told here, and returned."""
    hydra_config = HydraConfig.get()
    # A launcher's worker may have been started somewhere else.
    home = Path(hydra_config.runtime.cwd)
    folder = home / hydra_config.runtime.output_dir
    try:
        with contextlib.nullcontext() if raw.dry_run else refused_leave_no_result(folder):
            name_after_overrides(raw, list(hydra_config.overrides.task))
            config: Any = OmegaConf.to_object(raw)
            refuse_unknown_keys(raw, config)
            config.cache = str(home / config.cache)
        job(config, folder, OmegaConf.to_yaml(raw, resolve=True))
    except Exception as error:
        several = hydra_config.mode == RunMode.MULTIRUN
        if several and not raw.dry_run and not (folder / "result.json").is_file():  # else the run itself has told
            names = {
                group: {"name": str(raw[group].name)} for group in ("model", "quant", "protect", "qat") if group in raw
            }
            with contextlib.suppress(OSError, ValueError):  # a full disk, a folder that is not ours
                write_refusal(folder, config_name, OmegaConf.to_yaml(raw), names, one_line(error))
        if not isinstance(error, USER_ERRORS) and not out_of_memory(error):
            raise
        # Told here and not outside, where Hydra would have added lines of its own.
        _complain(error, f"job {hydra_config.job.num}: " if several else "")
        return error
    finally:
        _remove_if_empty(folder)
    return None


def end_sweep() -> bool:
    """Draws the sweep's report and sends its table to the tracker; True if no job failed and none is missing."""
    assert Watch.sweep is not None
    try:
        summary = report(Watch.sweep)
    except OSError as error:
        _complain(error, "the table of the sweep: ")
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
            _complain(ValueError(job["error"]), f"job {job['job']}: ")
    return not failed and not summary["unfinished"] and not summary.get("not_judged")


def _terminate(*_: object) -> None:
    print("terminated", file=sys.stderr)
    sys.exit(143)


def name_after_overrides(raw: DictConfig, overrides: list[str]) -> None:
    """A preset that was changed on the command line is no longer that preset: its name says what was changed.

    ``protect.blocks=[3,17]`` is named ``blocks=[3,17]`` and not after the preset whose blocks it replaced;
    another folder than tiny-wan's is named after the folder.
    """
    overrides = [override.lstrip("+") for override in overrides]
    if raw.model.name == "tiny" and raw.model.path != "tiny":
        raw.model.name = Path(raw.model.path).name
    planted = [o.removeprefix("model.") for o in overrides if o.startswith("model.outliers.")]
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
            raise ValueError(f"unknown key {path}{key}: no part of the program reads it")
        if isinstance(value, DictConfig) and is_dataclass(getattr(config, key)):
            refuse_unknown_keys(value, getattr(config, key), f"{path}{key}.")


def one_line(error: BaseException) -> str:
    """The message without line breaks; of an error of the disk also the file, of Hydra's the cause too."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(error, HydraException) and cause is not None and str(cause) not in str(error):
        parts += [line.strip() for line in str(cause).splitlines() if line.strip()]
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        parts.append("free some space, or write elsewhere with hydra.run.dir=<folder> or cache=<folder>")
    if out_of_memory(error):
        known = getattr(error, "__notes__", ["ask for fewer frames or a smaller picture (model.generation.*)"])
        parts.append(f"out of memory: {known[0]}")
    # OmegaConf names the key on a line of its own, which is noise where the message names it already.
    hidden = ["object_type=", "reference_type=", "See https://", "Set the environment variable"]
    # Nor are the places searched for a preset of use, or the advice to add a misspelt key.
    hidden += ["Config search path:", "provider=", "To append to your config use"]
    hidden += ["full_key:"] if any(part.startswith(("Key ", "Could not ")) for part in parts) else []
    shown = list(dict.fromkeys(part for part in parts if not part.startswith(tuple(hidden))))
    for place, part in enumerate(shown):
        if part.startswith("Available options in"):
            return "; ".join([*shown[:place], f"choose {', '.join(shown[place + 1 :])}"])
    return "; ".join(shown)


def _complain(error: BaseException, which: str = "") -> None:
    print(f"error: {which}{one_line(error)}", file=sys.stderr)


def _remove_if_empty(folder: Path) -> None:
    """A job refused before it began leaves a directory with an empty log: take those two away again."""
    log = folder / "log.txt"
    if log.is_file() and not log.stat().st_size and list(folder.iterdir()) == [log]:
        log.unlink()
        folder.rmdir()
