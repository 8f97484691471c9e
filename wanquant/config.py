"""Where the library meets Hydra: the schemas, and what the scripts share.

The config dataclasses live beside the parts they configure; here they are registered as schemas,
so that a misspelt key or a wrong type fails when the config is composed. Only the scripts import
this module, and only it and they import Hydra.

Hydra prints its own errors over several lines, and a traceback for everybody else's. ``main`` has
it let them through instead, and cuts what arrives down to one line: what is wrong, where, what to do.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wanquant.ptq.job import PTQConfig

CONF = str(Path(__file__).resolve().parent.parent / "conf")


ConfigStore.instance().store(name="ptq_schema", node=PTQConfig)


#: What a user can mend. Whatever else is raised is a defect of ours and keeps its traceback.
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError)


def main(config_name: str, job: Callable[[Any, Path, str], Any]) -> None:
    """Composes ``config_name``, turns it into its dataclass and calls ``job(config, run directory, yaml)``.

    In a multirun a job that fails does not take the others with it. Exits 0 only when every job
    returned, 1 after an error, 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # "full" means: raised here, not printed there
    failures = []

    @hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")
    def compose(raw: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            job(OmegaConf.to_object(raw), folder, OmegaConf.to_yaml(raw, resolve=True))
        except USER_ERRORS as error:
            # Caught here and not outside, where Hydra would have added lines of its own.
            failures.append(error)
            _complain(error)
        finally:
            _remove_if_empty(folder)

    # So that `kill` ends a run as an interrupt does, through its clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        compose()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        _complain(error)
        sys.exit(1)
    if failures:
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """The message without line breaks; of an error of the disk also the file, of Hydra's the cause too."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(error, HydraException) and cause is not None and str(cause) not in str(error):
        parts += [line.strip() for line in str(cause).splitlines() if line.strip()]
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        parts.append("free some space, or write elsewhere with hydra.run.dir=<folder>")
    hidden = ("full_key:", "object_type=", "reference_type=", "See https://", "Set the environment variable")
    return "; ".join(dict.fromkeys(part for part in parts if not part.startswith(hidden)))


def _complain(error: BaseException) -> None:
    print(f"error: {one_line(error)}", file=sys.stderr)


def _remove_if_empty(folder: Path) -> None:
    """A job refused before it began leaves a directory with an empty log: take it away again."""
    if folder.is_dir() and not any(path.stat().st_size for path in folder.rglob("*") if path.is_file()):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
