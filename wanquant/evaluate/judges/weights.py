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
import zipfile
from collections.abc import Callable, Sequence
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
    """``name`` is a path below ``root()``; ``sha256`` the publisher's, whole or its first digits, or empty; ``member``
    is what to take out of the archive at ``url``, a file or a folder."""

    name: str
    url: str
    used_by: tuple[str, ...]
    sha256: str = ""
    member: str = ""
    root: Callable[[], Path] = vbench_root

    @property
    def path(self) -> Path:
        return self.root() / self.name

    @property
    def recorded_as(self) -> str:
        return self.name if self.root is vbench_root else f"torch/{self.name}"


CLIP = "https://openaipublic.azureedge.net/clip/models"
HUB = "https://huggingface.co"
USED = f"{HUB}/OpenGVLab/VBench_Used_Models/resolve/main"
DINO = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
VICLIP = ("overall_consistency", "temporal_style")
#: LPIPS is no dimension of VBench.
LPIPS = "lpips"

WEIGHTS = (
    Weight("amt_model/amt-s.pth", f"{HUB}/lalala125/AMT/resolve/main/amt-s.pth", ("motion_smoothness",)),
    Weight(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        ("dynamic_degree",),
        member="models/raft-things.pth",
    ),
    Weight(
        "dino_model/facebookresearch_dino_main",
        "https://github.com/facebookresearch/dino/archive/refs/heads/main.zip",
        ("subject_consistency",),
        member="dino-main/",
    ),
    # VBench asks for the first, and what it loads is the second.
    Weight("dino_model/dino_vitbase16_pretrain.pth", DINO, ("subject_consistency",)),
    Weight("checkpoints/dino_vitbase16_pretrain.pth", DINO, ("subject_consistency",), root=torch_root),
    Weight("clip_model/ViT-B-32.pt", f"{CLIP}/{B32}/ViT-B-32.pt", ("background_consistency",), B32),
    Weight("clip_model/ViT-L-14.pt", f"{CLIP}/{L14}/ViT-L-14.pt", ("aesthetic_quality",), L14),
    Weight(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        ("aesthetic_quality",),
    ),
    Weight(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        ("imaging_quality",),
        "358bb6af",
    ),
    Weight("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{USED}/ViClip-InternVid-10M-FLT.pth", VICLIP),
    Weight(
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        VICLIP,
    ),
    Weight(
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        f"{USED}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        ("human_action",),
    ),
    Weight(
        "checkpoints/alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        (LPIPS,),
        "7be5be79",
        root=torch_root,
    ),
)


@dataclass(frozen=True)
class Found:
    """``state``: ``missing``, ``published`` (it is the publisher's), ``recorded`` (as at first sight), ``new`` (not on
    record yet), ``other`` (not what was published or recorded; ``expected`` says what that is)."""

    weight: Weight
    state: str
    sha256: str = ""
    expected: str = ""


def needed(names: Sequence[str]) -> list[Weight]:
    """Of these dimensions, or ``LPIPS``."""
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
    there = next((copy for copy in copies if copy.is_file()), None)
    if there is not None:
        shutil.copyfile(there, target)
    return there is not None


def _place(part: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(part, partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        return
    with replacing(path) as temporary:
        shutil.copyfile(part, temporary)
