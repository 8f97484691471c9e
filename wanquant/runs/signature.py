"""What a run's numbers depend on: as a hash, by which a finished run is found again, and as ``provenance`` to read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from dis import opmap
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import wanquant
from wanquant.plugins import load_plugins
from wanquant.runs.run import SCHEMA, VOLATILE, clean_json, digest

#: Whose versions can change a number, besides torch's.
COUNTED = ("diffusers", "numba", "numpy", "transformers")
#: Rooms of the package whose code can change what is generated, and what is measured on it.
GENERATES = ("formats", "kernels", "quant", "wan")
MEASURES = (*GENERATES, "evaluate", "ptq")
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "numba", "torch_npu")


NOP = opmap["NOP"]
#: Of the package.
ROOT = Path(wanquant.__file__).parent


@cache
def code_hash(rooms: tuple[str, ...]) -> str:
    """SHA-256 of what the package's code in these rooms does."""
    digest_ = hashlib.sha256()
    for path in sorted(p for room in rooms for p in (ROOT / room).rglob("*.py")):
        digest_.update(f"{path.relative_to(ROOT).as_posix()} {what_it_does(path.read_text(encoding='utf-8'))}".encode())
    return digest_.hexdigest()


def what_it_does(source: str) -> str:
    """The bytecode of a module: of its text without comments, docstrings, assertions and layout."""
    return _described(compile(source, "", "exec", dont_inherit=True, optimize=2))


def _described(value: Any) -> str:
    """A constant, or code, without where it stands in the file."""
    if isinstance(value, CodeType):
        named = (value.co_name, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        taken = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
        steps = (value.co_code[place : place + 2] for place in range(0, len(value.co_code), 2))
        done = b"".join(step for step in steps if step[0] != NOP)  # which stands where a docstring was
        return f"{named} {taken} {done.hex()} {_described(value.co_consts)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, frozenset):  # of which each process has an order of its own
        return f"{{{', '.join(sorted(map(_described, value)))}}}"
    return repr(value)


def signature(config: dict[str, Any], fingerprint: str, device: torch.device, rooms: tuple[str, ...] = MEASURES) -> str:
    """Hash of everything that can change the numbers, and of nothing else.

    ``config`` is the resolved config; the model counts by its ``fingerprint``, not by its path; the code by what it
    does in the ``rooms`` that matter.
    """
    counted = clean_json(config)
    for key in VOLATILE:
        first, *rest = key.split(".")
        for group in counted.keys() if first == "*" else [first]:
            place: Any = counted
            for name in [group, *rest][:-1]:
                place = place.get(name, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict) and (rest or group in counted):
                place.pop([group, *rest][-1], None)
    return digest(
        {
            "config": counted,
            "model": fingerprint,
            "schema": SCHEMA,
            "code": code_hash(rooms),
            **({"plugins": plugins} if (plugins := load_plugins()) else {}),
            "device": device.type,
            "device_name": _card_name(device),
            "torch": torch.__version__,
            "packages": {name: installed(name) for name in COUNTED},
            "threads": torch.get_num_threads(),
            "instructions": _instructions(device),
        }
    )


def _card_name(device: torch.device) -> str | None:
    name: str | None = None if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return name


def _instructions(device: torch.device) -> list[str]:
    """What of a CPU decides how a product is summed; of a card nothing is asked."""
    # Not in every torch this package allows.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return sorted(name for name, there in known.items() if there is True and name.startswith(("avx", "amx", "sve")))


@cache
def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    name = _card_name(device) or platform.processor() or platform.machine()
    return {
        "version": wanquant.__version__,
        **_git(),
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := installed(package)) is not None},
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "instructions": _instructions(device),
    }


def _git() -> dict[str, Any]:
    """Commit and dirtiness of the checkout this package runs from; None where it is an installed one."""
    root = Path(wanquant.__file__).resolve().parents[1]

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository.
    if ask("rev-parse", "--show-toplevel") != str(root):
        return {"git_commit": None, "dirty": None}
    return {"git_commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
