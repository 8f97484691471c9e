"""Weights that judge videos: where VBench and LPIPS look for them, who publishes them, and what they must be.

VBench fetches what it misses in the middle of a run; here only ``python -m wanquant.doctor fetch`` fetches anything,
and everything is checked before a network is built. Most of these files are pickles, so what they are matters: their
SHA-256 is compared with the publisher's where there is one, else with what was on record at first sight, in
``SHA256SUMS`` beside them, which travels with them to machines without a network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wanquant.runs.cache import locked
from wanquant.runs.files import replacing, sum_of_file, write_atomic

RECORD = "SHA256SUMS"


def vbench_root() -> Path:
    """As in ``vbench.utils``."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def torch_root() -> Path:
    """As in ``torch.hub``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser() / "hub"


@dataclass(frozen=True)
class Weight:
    """``name`` is a path below ``root``, that of ``vbench`` or ``torch``; ``used_by`` are dimensions; ``sha256`` is the
    publisher's, whole or its first digits, or empty; ``member`` is what to take out of the archive at ``url``, a file
    or a folder."""

    name: str
    url: str
    used_by: tuple[str, ...]
    sha256: str = ""
    member: str = ""
    root: str = "vbench"

    @property
    def path(self) -> Path:
        return (torch_root() if self.root == "torch" else vbench_root()) / self.name

    @property
    def recorded_as(self) -> str:
        return f"torch/{self.name}" if self.root == "torch" else self.name


#: Dimensions that ViCLIP judges.
VICLIP = ("overall_consistency", "temporal_style")
#: LPIPS is no dimension of VBench.
LPIPS = "lpips"
#: Neither is the flow that ``motion_speed`` is taken by.
RAFT = "raft"


def _listed() -> tuple[Weight, ...]:
    """Those of ``weights.toml``."""
    listed = tomllib.loads(Path(__file__).with_name("weights.toml").read_text(encoding="utf-8"))["weights"]
    return tuple(Weight(**{**each, "used_by": tuple(each["used_by"])}) for each in listed)


WEIGHTS = _listed()


@dataclass(frozen=True)
class Found:
    """``state``: ``missing``, ``published`` (it is the publisher's), ``recorded`` (as at first sight), ``new`` (not on
    record yet), ``other`` (not what was published or recorded; ``expected`` says what that is)."""

    weight: Weight
    state: str
    sha256: str = ""
    expected: str = ""


def needed(names: Sequence[str]) -> list[Weight]:
    """Of these dimensions, ``LPIPS`` or ``RAFT``."""
    return [weight for weight in WEIGHTS if set(weight.used_by) & set(names)]


def find(weight: Weight) -> Found:
    if not weight.path.exists():
        return Found(weight, "missing")
    actual, recorded = sum_of(weight.path), _record().get(weight.recorded_as, "")
    if weight.sha256:
        state = "published" if actual.startswith(weight.sha256) else "other"
    else:
        state = "new" if not recorded else "recorded" if actual == recorded else "other"
    return Found(weight, state, actual, weight.sha256 or recorded)


def missing(names: Sequence[str]) -> list[Weight]:
    return [weight for weight in needed(names) if not weight.path.exists()]


def checked(names: Sequence[str], foreign: bool = False) -> dict[str, str]:
    """Name to SHA-256 of what these dimensions load; what is seen for the first time goes on record.

    ``ValueError`` names a file that is missing, or, unless ``foreign`` files are wanted, another than it should be.
    """
    lacking = [name for name in names if missing([name])]
    if lacking:
        paths = ", ".join(str(weight.path) for weight in missing(lacking))
        raise ValueError(
            f"weights are missing: on a machine with a network `python -m wanquant.doctor fetch {' '.join(lacking)}` "
            f"gets them ({paths})"
        )
    sums = {}
    for found in map(find, needed(names)):
        weight = found.weight
        if found.state == "other" and not foreign:
            raise ValueError(
                f"{weight.path} has the SHA-256 {found.sha256[:12]}..., not {found.expected[:12]}...: fetch it again, "
                f"or mark the scores as meaningless with eval.foreign_weights=true"
            )
        if found.state == "new":
            try:
                record({weight.recorded_as: found.sha256})
            except OSError as error:  # a place that others look after
                print(f"{weight.path} is not on record, and cannot be put there: {error}", file=sys.stderr, flush=True)
        sums[weight.recorded_as] = found.sha256
    return sums


def sum_of(path: Path) -> str:
    """SHA-256 of a file, of a folder over its Python files by name and content."""
    if path.is_dir():
        whole = hashlib.sha256()
        for part in sorted(path.rglob("*.py")):
            whole.update(f"{part.relative_to(path)} {sum_of(part)}\n".encode())
        return whole.hexdigest()
    stat = path.stat()
    return _sum_as_it_is(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _sum_as_it_is(path: Path, size: int, changed: int) -> str:
    """Gigabytes are read once by a process, be they asked for by every job of a sweep."""
    return sum_of_file(path)


def _record() -> dict[str, str]:
    path = vbench_root() / RECORD
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: sum_ for sum_, _, name in (line.partition("  ") for line in lines)}


def record(sums: dict[str, str]) -> None:
    with locked(vbench_root() / f"{RECORD}.lock", RECORD):
        merged = {**_record(), **sums}
        write_atomic(vbench_root() / RECORD, "".join(f"{merged[name]}  {name}\n" for name in sorted(merged)))


def fetch(weight: Weight) -> None:
    """From its publisher to its place, checked against the publisher's sum, and on record from then on."""
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "download"
        if not _at_hand(weight, part):
            _download(weight.url, part)
        if weight.member:
            with zipfile.ZipFile(part) as archive:
                wanted = [name for name in archive.namelist() if name.startswith(weight.member)]
                archive.extractall(scratch, wanted)
            part = Path(scratch) / weight.member
        actual = sum_of(part)
        if not actual.startswith(weight.sha256):
            raise ValueError(f"{weight.url} gave a file with the SHA-256 {actual[:12]}..., not {weight.sha256[:12]}...")
        known = _record().get(weight.recorded_as, actual)
        if actual != known:
            raise ValueError(
                f"{weight.url} gave a file with the SHA-256 {actual[:12]}..., and {known[:12]}... is on record: if you "
                f"trust it, remove its line from {vbench_root() / RECORD} first"
            )
        _place(part, weight.path)
    record({weight.recorded_as: actual})


def _download(url: str, target: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        download_url_to_file(url, str(target))
    except OSError as error:
        raise OSError(f"cannot fetch {url}: {error}") from error


def _at_hand(weight: Weight, target: Path) -> bool:
    """What another place on this disk holds is copied from there: DINO's weights, which are wanted twice, and CLIP's
    vocabulary, which comes with its package."""
    copies = [other.path for other in WEIGHTS if other.url == weight.url and other != weight]
    clip = importlib.util.find_spec("clip")
    if clip is not None and clip.origin:
        copies.append(Path(clip.origin).parent / Path(weight.name).name)
    for copy in copies:
        if copy.is_file():
            shutil.copyfile(copy, target)
            return True
    return False


def _place(part: Path, path: Path) -> None:
    if part.is_file():
        with replacing(path) as temporary:
            shutil.copyfile(part, temporary)
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(part, partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
