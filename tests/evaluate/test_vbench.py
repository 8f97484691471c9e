"""The real VBench, on networks of the true architecture with random weights: what is tested is everything but whether
its scores mean anything."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests import forked
from tests.conftest import DECORD
from tests.evaluate import judges
from wanquant.evaluate.judges import frames, vbench, weights
from wanquant.evaluate.judges.vbench import Clip, clip_of
from wanquant.runs import pictures
from wanquant.runs.cache import Cache

CPU = torch.device("cpu")
PROMPT = "A person is clapping"
SCORED = [
    pytest.param(name, marks=pytest.mark.slow if name in (*judges.LARGE, "imaging_quality") else ())
    for name in sorted(judges.JUDGES)
] + ["temporal_flickering", pytest.param("temporal_style", marks=pytest.mark.slow)]


def write(path: Path, seed: int, side: int = 128, count: int = 3) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    pictures.write_mp4(path, coarse.repeat(8, 1).repeat(8, 2), 8)
    return path


def clips(folder: Path, count: int = 2, prompt: str = PROMPT) -> list[Clip]:
    return [clip_of(write(folder / f"{seed}.mp4", seed), prompt, seed) for seed in range(count)]


def weights_for(dimension: str) -> dict[str, str]:
    builder = judges.JUDGES.get({"temporal_style": "overall_consistency"}.get(dimension, dimension))
    if weights.missing([dimension]):
        assert builder is not None
        vbench.importable([])  # with what stands in for decord, which VBench's networks import too
        builder()
    return vbench.prepare([dimension], foreign=True)


@pytest.mark.parametrize("dimension", SCORED)
def test_scores_are_what_vbench_returns(dimension: str, tmp_path: Path) -> None:
    """Of all videos in one call of VBench, as its users call it, and of one and then both of ours."""
    sums, videos = weights_for(dimension), clips(tmp_path / "videos")
    named = {f"{clip.prompt}-{clip.seed}.mp4": clip for clip in videos}
    (tmp_path / "named").mkdir()
    for name, clip in named.items():
        (tmp_path / "named" / name).symlink_to(clip.path)
    from vbench import VBench

    judge = VBench("cpu", str(judges.package() / "VBench_full_info.json"), str(tmp_path / "out"))
    how = {"dimension_list": [dimension], "local": True, "mode": "custom_input"}
    judge.evaluate(str(tmp_path / "named"), "all", prompt_list=dict.fromkeys(named, PROMPT), **how)
    average, per_video = json.loads((tmp_path / "out" / "all_eval_results.json").read_text())[dimension]
    by_seed = {int(Path(item["video_path"]).stem[-1]): item["video_results"] for item in per_video}

    cache = Cache(tmp_path / "cache")
    first = vbench.score(dimension, videos[:1], CPU, cache, sums)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")}
    assert len(written) == 1
    scores = vbench.score(dimension, videos, CPU, cache, sums)
    scale = vbench.DIMENSIONS[dimension].scale
    assert scores == [pytest.approx(by_seed[seed] * scale, rel=1e-12) for seed in range(2)]
    assert scores[:1] == first
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert np.mean(scores) == pytest.approx(average, rel=1e-6, abs=1e-9)


def test_temporal_flickering_by_hand(tmp_path: Path) -> None:
    """1 less the mean absolute change between frames, of 255; of grey frames known, of others from the frames read."""
    greys = np.array([60, 90, 90, 150], np.uint8)
    grey = np.broadcast_to(greys[:, None, None, None], (4, 64, 64, 3))
    pictures.write_mp4(tmp_path / "grey.mp4", grey, 8)
    noisy = write(tmp_path / "noisy.mp4", 0)
    videos = [clip_of(path, "any", 0) for path in (tmp_path / "grey.mp4", noisy)]
    scores = vbench.score("temporal_flickering", videos, CPU, Cache(tmp_path / "cache"), vbench.prepare([]))
    assert scores[0] == pytest.approx(1 - (30 + 0 + 60) / 3 / 255, abs=2 / 255)
    capture, read = cv2.VideoCapture(str(noisy)), []
    while (frame := capture.read())[0]:
        read.append(frame[1].astype(np.float64))
    assert len(read) == 3
    by_hand = 1 - np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(read)]) / 255
    assert scores[1] == pytest.approx(by_hand, rel=1e-6)


def test_the_standards_mode_knows_prompts_by_the_files_names(tmp_path: Path) -> None:
    official = "In a still frame, a stop sign"
    videos = [clip_of(write(tmp_path / f"{seed}.mp4", seed), official, seed) for seed in range(2)]
    scores = vbench.score("temporal_flickering", videos, CPU, Cache(tmp_path / "a"), {}, official=True)
    assert scores == vbench.score("temporal_flickering", videos, CPU, Cache(tmp_path / "b"), {})
    strange = [clip_of(write(tmp_path / "x.mp4", 9), "no prompt of VBench's", 0)]
    with pytest.raises(ValueError, match=r"no score for .*x\.mp4|failed"):
        vbench.score("temporal_flickering", strange, CPU, Cache(tmp_path / "a"), {}, official=True)


def test_what_raft_and_umt_have_nothing_to_say_on(tmp_path: Path) -> None:
    """VBench would score both 0."""
    small = clip_of(write(tmp_path / "small.mp4", 0, side=64), "a red circle", 0)
    assert "RAFT" in vbench.why_not("dynamic_degree", small)
    assert "a person is" in vbench.why_not("human_action", small)
    large = clip_of(write(tmp_path / "large.mp4", 0), PROMPT, 0)
    assert not vbench.why_not("dynamic_degree", large)
    assert not vbench.why_not("human_action", large)
    weights_for("dynamic_degree")
    from easydict import EasyDict
    from vbench.dynamic_degree import DynamicDegree

    model = str(judges.place("raft_model/models/raft-things.pth"))
    network = DynamicDegree(
        EasyDict(model=model, small=False, mixed_precision=False, alternate_corr=False), "cpu"
    ).model
    for side, broken in ((120, True), (128, False)):
        with torch.no_grad():
            _, flow = network(*torch.rand(2, 1, 3, side, side) * 255, iters=1, test_mode=True)
        assert bool(flow.isnan().all()) is broken


def test_bad_videos(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"cannot read the video .*no\.mp4"):
        clip_of(tmp_path / "no.mp4", "a", 0)
    with pytest.raises(ValueError, match=r"cannot read the video .*nowhere\.mp4"):
        clip_of(tmp_path / "nowhere.mp4", "a", 0)
    with pytest.raises(ValueError, match="has 1 frame: a video has at least two"):
        clip_of(write(tmp_path / "one.mp4", 0, count=1), "a", 0)
    assert vbench.score("temporal_flickering", [], CPU, Cache(tmp_path), {}) == []


def test_bad_dimensions() -> None:
    with pytest.raises(ValueError, match="VBench refuses color of videos"):
        vbench.prepare(["color"])
    with pytest.raises(ValueError, match="no dimension beauty; choose of subject_consistency"):
        vbench.prepare(["beauty"])
    with pytest.raises(ValueError, match="twice"):
        vbench.prepare(["temporal_flickering", "temporal_flickering"])


def test_missing_weights_are_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    for name in set(vbench.DIMENSIONS) - {"temporal_flickering"}:
        with pytest.raises(ValueError, match=rf"weights are missing: .* `python -m wanquant.doctor fetch {name}`"):
            vbench.prepare([name])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(bool(os.environ.get("WANQUANT_TEST_WITHOUT_DECORD")), reason="this is that run")
@pytest.mark.slow
def test_where_decord_has_no_wheel() -> None:
    """The same tests in a process that cannot import decord."""
    command = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-k", "not wheel", __file__]
    done = forked.run(command, {"WANQUANT_TEST_WITHOUT_DECORD": "1"})
    assert done.returncode == 0, done.stdout[-3000:]


def test_which_reader_is_used() -> None:
    vbench.prepare(["temporal_flickering"])
    assert frames.stands_in() is not DECORD
