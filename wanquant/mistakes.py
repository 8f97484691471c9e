"""A user's mistake as one line: what is wrong, where, and what to do, with the key or preset that may have been meant.

Hydra and OmegaConf tell a mistake over several lines; what of them helps is kept.
"""

from __future__ import annotations

import errno
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from wanquant.choices import did_you_mean

#: What a user can mend. Whatever else is raised is a defect of ours and keeps its traceback.
USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    OSError,
    BrokenExecutor,
)
#: Keys of Hydra's that a command may well set, besides our own.
HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher.n_jobs", "hydra.verbose", "hydra.mode")
#: How Hydra tells of a key that there is not, and OmegaConf of one in a file.
UNKNOWN = (
    re.compile(r"Could not override '([^']+)'"),
    re.compile(r"Could not delete from config. '([^']+)' does not exist"),
    re.compile(r"Key '[^']+' not in '.*full_key: (\S+)", re.DOTALL),
)
NO_PRESET = re.compile(r"Could not (?:find|load) '(.+)/([^/']*)'")
AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*)'$", re.MULTILINE)
#: Lines that help nobody: OmegaConf's types, links, where presets were searched, the advice to add a misspelt key.
NOISE = (
    *("object_type=", "reference_type=", "See https://", "Set the environment variable"),
    *("Config search path:", "provider=", "To append to your"),
)


def one_line(error: BaseException, schema: type | None = None) -> str:
    """The message without line breaks; of an error of the disk also the file, of Hydra's the cause too. ``schema`` is
    the dataclass of the program's config, among whose keys a misspelt one is looked for."""
    text = _text(error)
    if isinstance(error, BrokenExecutor):
        killed = "a worker was killed, by hand or for its memory: what is finished is kept"
        return f"{killed}, the same command with hydra.sweep.dir=<the sweep's folder> goes on there"
    if isinstance(error, HydraException | OmegaConfBaseException):
        known = _unreadable(error, text) or _misspelt(text, schema)
        if known:
            return known
    parts = [line.strip() for line in text.splitlines() if line.strip()]
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        parts.append("free some space, or write elsewhere with hydra.run.dir=<folder> or cache=<folder>")
    if ran_out_of_memory(error):
        advice = getattr(error, "__notes__", ["ask for fewer frames or a smaller picture (model.generation.*)"])
        parts.append(f"out of memory: {advice[0]}")
    # OmegaConf names the key on a line of its own, which is noise where the message names it already.
    hidden = (*NOISE, "full_key:") if any(part.startswith(("Key ", "Could not ")) for part in parts) else NOISE
    return "; ".join(dict.fromkeys(part for part in parts if not part.startswith(hidden)))


def complain(error: BaseException, which: str = "", schema: type | None = None) -> None:
    print(f"error: {which}{one_line(error, schema)}", file=sys.stderr)


def ran_out_of_memory(error: BaseException) -> bool:
    """Without torch, which has errors of its own for it, nothing large was begun."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from wanquant.wan.device import out_of_memory

    return out_of_memory(error)


def keys_of(schema: type, path: str = "") -> Iterator[str]:
    """The dotted keys of a config dataclass, those of groups among them."""
    types = get_type_hints(schema)
    for each in fields(schema):
        yield f"{path}{each.name}"
        inner: Any = types[each.name]
        if isinstance(inner, type) and is_dataclass(inner):
            yield from keys_of(inner, f"{path}{each.name}.")


def _text(error: BaseException) -> str:
    """With what caused it, where that says more."""
    cause = error.__cause__
    if isinstance(error, HydraException) and cause is not None and str(cause) not in str(error):
        return f"{error}\n{cause}"
    return str(error)


def _unreadable(error: BaseException, text: str) -> str:
    """How to write a value that Hydra's grammar takes for something else, as it does many a folder or prompt; nothing
    of other errors."""
    several = AMBIGUOUS.search(text)
    override = error.override if isinstance(error, OverrideParseException) else several[1] if several else ""
    key, equals, value = override.partition("=")
    if not override or not equals:
        return f"{override}: give a key and its value, key=value" if override else ""
    # Of backslashes Hydra takes only those before a quote for anything but themselves.
    text = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value)
    advice = "a text is quoted twice, for Hydra and for the shell: " + shlex.quote(f'{key}="{text}"')
    listed = f"a list is {shlex.quote(f'{key}=[{value}]' if several else f'{key}=[...]')}, texts in it in double quotes"
    if value.startswith("["):
        advice = listed
    elif several:
        advice = f"{listed}; {advice}"
    return f"{key}={value} cannot be read; {advice}"


def _misspelt(text: str, schema: type | None) -> str:
    """What to say of a key or a preset that there is not; nothing of other errors."""
    preset = NO_PRESET.search(text)
    if preset:
        group, name = preset.groups()
        listed = text.partition(f"Available options in '{group}':")[2].partition("Config search path")[0].split()
        advice = f"choose {', '.join(listed)}" if listed else "there is no such preset"
        return f"{group}={name}: {did_you_mean(name, listed)}{advice}"
    unknown = next((found[1] for pattern in UNKNOWN if (found := pattern.search(text))), None)
    if unknown is None or (schema is not None and unknown in set(keys_of(schema))):
        return ""
    guess = did_you_mean(unknown, (*keys_of(schema), *HYDRA)) if schema is not None else ""
    return f"there is no key {unknown}: {guess or '--cfg job lists all of them'}".rstrip()
