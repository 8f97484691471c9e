"""VBench's own verdict on video files, by the real package and its Python API; nothing of it is reimplemented.

What is added is what a user misses in it: weights are checked before anything is loaded, and never fetched in passing;
the score of every video is kept, by the file's content, so that no video is judged twice and a killed evaluation goes
on; a video that VBench skips in silence is an error. Its ``torch.distributed`` is left alone, since its gathering
knows CUDA only: processes share the work through the cache's locks.

An average of VBench's is the mean over videos, except that subject and background consistency weight a video by its
number of frames, which is the same where all are as long.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import torch

from wanquant.evaluate.judges import weights
from wanquant.evaluate.judges.frames import stand_in, stands_in
from wanquant.evaluate.prompts import vbench_folder
from wanquant.runs.cache import Cache
from wanquant.runs.progress import progress
from wanquant.runs.run import digest
from wanquant.runs.signature import installed, signature

VERSION, PYIQA = "0.1.5", "0.1.16"
INSTALL = f"pip install 'wanquant[vbench]' && pip install --no-deps vbench=={VERSION} pyiqa=={PYIQA}"


@dataclass(frozen=True)
class Dimension:
    """``scale`` takes VBench's figure of one video to the scale of its average."""

    name: str
    meaning: str
    scale: float = 1.0
    #: Whether the prompt, or the file's name made from it, is part of what is judged.
    by_prompt: bool = False


DIMENSIONS = {
    each.name: each
    for each in (
        Dimension("subject_consistency", "DINO features of the frames alike"),
        Dimension("background_consistency", "CLIP features of the frames alike"),
        Dimension("temporal_flickering", "1 less the mean change from frame to frame"),
        Dimension("motion_smoothness", "frames that AMT interpolates close to the true ones"),
        Dimension("dynamic_degree", "share of videos in which RAFT sees large motion"),
        Dimension("aesthetic_quality", "LAION's predictor on CLIP features"),
        Dimension("imaging_quality", "MUSIQ: noise, blur, exposure", scale=0.01),
        Dimension("human_action", "share in which UMT recognises 'a person is ...'", by_prompt=True),
        Dimension("temporal_style", "ViCLIP likeness of video and prompt", by_prompt=True),
        Dimension("overall_consistency", "ViCLIP likeness of video and prompt", by_prompt=True),
    )
}
#: What VBench itself refuses of one's own videos: these need its annotated prompts and further networks.
REFUSED = ("object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship")
#: Longer videos, in seconds, are for VBench-Long.
LONG = 5.0
#: The smallest side of which RAFT's pyramid has a top: below it all flow is NaN, and no video moves.
LEAST_SIDE = 121
#: Videos given to VBench at a time at first; twice as many while that takes less than so many seconds, up to so many.
CHUNK, QUICK, MOST = 4, 30.0, 64
#: Whose versions can change a score.
COUNTED = ("torchvision", "transformers", "timm", "pyiqa", "opencv-python-headless", "openai-clip", "numpy")


@dataclass(frozen=True)
class Clip:
    """A video file and the prompt it was made for. ``sha256`` is of its content, ``seconds`` its length, ``side`` the
    smaller of its sides in pixels."""

    path: Path
    prompt: str
    seed: int
    sha256: str
    seconds: float
    side: int

    @property
    def long(self) -> bool:
        return self.seconds >= LONG


def clip_of(path: Path, prompt: str, seed: int) -> Clip:
    """``ValueError`` for what is no video of at least two frames: VBench would skip it in silence, or trip over it."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames, rate = sum(1 for _ in container.decode(video=0)), float(stream.average_rate or 0)
    except (OSError, av.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read the video {path}: {str(error) or type(error).__name__}") from None
    if frames < 2 or rate <= 0:
        raise ValueError(f"{path} has {frames} frame{'s' if frames != 1 else ''}: a video has at least two")
    return Clip(path, prompt, seed, weights.sum_of(path), frames / rate, min(stream.width, stream.height))


def check_dimensions(names: Sequence[str]) -> None:
    """``ValueError`` for what VBench does not know or refuses, before anything else is looked at."""
    for name in names:
        if name in REFUSED:
            raise ValueError(f"eval.dimensions: VBench refuses {name} of videos that are not of its own annotated list")
        if name not in DIMENSIONS:
            raise ValueError(f"eval.dimensions: VBench has no dimension {name}; choose of {', '.join(DIMENSIONS)}")
    if len(set(names)) != len(names):
        raise ValueError("eval.dimensions names a dimension twice")


def prepare(names: Sequence[str], foreign: bool = False) -> dict[str, str]:
    """Everything that can be wrong before a network is built: the package, its imports, the weights, whose sums are
    returned. ``ValueError`` says what to do."""
    check_dimensions(names)
    if not names:
        return {}
    sums = weights.checked(names, foreign)
    importable(names)
    return sums


def importable(names: Sequence[str]) -> None:
    """``ValueError`` says what is not installed."""
    if importlib.util.find_spec("vbench") is None:
        raise ValueError(f"VBench is not installed: {INSTALL}")
    _stand_ins()
    with _quietly():
        for name in ("vbench", *(f"vbench.{name}" for name in names)):
            try:
                importlib.import_module(name)
            except Exception as error:  # a dozen libraries, each with its own
                raise ValueError(f"cannot import {name}: {_told(error)}; {INSTALL}") from error


def _stand_ins() -> None:
    """For what VBench imports and this machine, or a newer library, does not have."""
    stand_in()
    try:
        importlib.import_module("numpy.lib.function_base")
    except ModuleNotFoundError:
        # Since numpy 2. The code behind human_action imports a function of it, and never calls it.
        module = ModuleType("numpy.lib.function_base")
        module.__dict__["disp"] = print
        sys.modules[module.__name__] = module


def why_not(dimension: str, clip: Clip) -> str:
    """Why a dimension has nothing to say on a video, where VBench would call it 0; empty if it has."""
    if dimension == "human_action":
        # It takes its label out of the file's name, which is the prompt, and wants it to be one of UMT's.
        label = clip.prompt.lower().split("-")[0].split("person is ")[-1].split("_")[0]
        fits = label in _actions() and "/" not in clip.prompt
        return "" if fits else "no prompt 'a person is <a Kinetics-400 action>'"
    if dimension == "dynamic_degree" and clip.side < LEAST_SIDE:
        return f"RAFT sees no motion in less than {LEAST_SIDE} pixels"
    return ""


@cache
def _actions() -> frozenset[str]:
    listed = vbench_folder() / "third_party" / "umt" / "kinetics_400_categories.txt"
    return frozenset(line.split("\t")[0].strip().lower() for line in listed.read_text().splitlines())


def refuse_pointless(names: Sequence[str], prompts: Sequence[str], side: int) -> None:
    """``ValueError`` where no dimension has anything to say on any video of these prompts, ``side`` pixels small."""
    if not names:
        return
    clips = [Clip(Path(), prompt, 0, "", 0.0, side) for prompt in prompts]
    if not any(why_not(name, clip) == "" for name in names for clip in clips):
        raise ValueError("; ".join(f"{name}: {why_not(name, clips[0])}" for name in names))


def score(
    dimension: str,
    clips: Sequence[Clip],
    device: torch.device,
    kept: Cache,
    sums: dict[str, str],
    official: bool = False,
    side: str = "",
) -> list[float]:
    """VBench's figure of every video, on the scale of its averages, in the order of ``clips``.

    ``sums`` are from ``prepare``. ``official`` calls VBench's standard mode, which knows prompts by the files' names.
    """
    about = DIMENSIONS[dimension]
    counted = {
        "dimension": dimension,
        "official": official,
        "weights": {weight.recorded_as: sums[weight.recorded_as] for weight in weights.needed([dimension])},
        "reader": reader(),
        "packages": {name: installed(name) for name in ("vbench", *COUNTED)},
    }
    names = [digest([clip.sha256, clip.prompt if about.by_prompt or official else ""])[:32] for clip in clips]
    by_name = dict(zip(names, clips, strict=True))
    cells = kept.cells("vbench", signature(counted, "", device, rooms=()))
    known: dict[str, Any] = {name: cells.get(name) for name in by_name}
    missing = list(known.values()).count(None)
    if not missing:
        return [known[name] for name in names]
    with progress(" ".join((dimension, side)).strip(), missing, "video") as tick:

        def measure(chunk: list[str]) -> list[Any]:
            found = _evaluate(dimension, [by_name[name] for name in chunk], device, official)
            for _ in chunk:
                tick()
            return [value * about.scale for value in found]

        values = cells.shared(list(by_name), measure, _sizes())
    return [values[name] for name in names]


def _sizes() -> Iterator[int]:
    """How many videos to take next: each call of VBench loads its network anew, and what a call has not finished is
    lost when it is killed."""
    size = CHUNK
    while True:
        begun = time.monotonic()
        yield size
        size = min(MOST, size * 2) if time.monotonic() - begun < QUICK else size


def reader() -> str:
    """Of the frames, and its version."""
    package = "av" if stands_in() else "decord"
    return f"{package} {installed(package)}"


def _evaluate(dimension: str, clips: Sequence[Clip], device: torch.device, official: bool) -> list[float]:
    """One call of VBench on links to these files, and its figures in their order."""
    from vbench import VBench

    with tempfile.TemporaryDirectory() as scratch, _quietly():
        videos = Path(scratch) / "videos"
        videos.mkdir()
        # The standard's names where VBench reads something out of them.
        standard = official or dimension == "human_action"
        named = {
            f"{clip.prompt}-{clip.seed}.mp4" if standard else f"{place:05d}.mp4": clip
            for place, clip in enumerate(clips)
        }
        assert len(named) == len(clips)
        for name, clip in named.items():
            (videos / name).symlink_to(clip.path.resolve())
        how: dict[str, Any] = {"mode": "vbench_standard"}
        if not official:
            how = {"mode": "custom_input", "prompt_list": {name: clip.prompt for name, clip in named.items()}}
        try:
            # Without a number: motion_smoothness compares with "cuda" to learn whether it has to spare memory.
            judge = VBench(device.type, str(vbench_folder() / "VBench_full_info.json"), scratch)
            judge.evaluate(str(videos), "run", dimension_list=[dimension], local=True, read_frame=False, **how)
        except Exception as error:
            raise ValueError(f"VBench's {dimension} failed: {_told(error)}") from error
        results = json.loads((Path(scratch) / "run_eval_results.json").read_text(encoding="utf-8"))
    found = {Path(item["video_path"]).name: item["video_results"] for item in results[dimension][1]}
    for name, clip in named.items():
        value = found.get(name)
        if value is None or not math.isfinite(value):
            raise ValueError(f"VBench's {dimension} gives {'no score' if value is None else value} for {clip.path}")
    return [float(found[name]) for name in named]


@contextmanager
def _quietly() -> Iterator[None]:
    """VBench prints, logs and draws bars, and sets up the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _told(error: BaseException) -> str:
    """In a line; of files that only a full unpickling opens, how to allow it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "weights_only" in str(error):
        return f"{lines[0]} If you trust the file, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
    return lines[0]
