"""Motion that is slow, late or gone, planted in videos of which it is known how fast they move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wanquant.evaluate import attributes, gates, motion
from wanquant.evaluate.compare import Networks, of_pair
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.judges import flow
from wanquant.evaluate.stats import Item, estimate
from wanquant.wan import tiny
from wanquant.wan.generate import Sample

SCENES = [scene for scene in tiny.all_scenes() if scene.held_out][::3]


def filmed(scene: tiny.Scene, seed: int, late: int = 0) -> Sample:
    """A scene with a little noise, that begins to move ``late`` frames later."""
    frames = tiny.draw(scene, np.random.default_rng(seed))[np.maximum(0, np.arange(tiny.NUM_FRAMES) - late)]
    return _noisy(scene, seed, frames)


def slowed(scene: tiny.Scene, seed: int, speed: float) -> Sample:
    """The same at so many times its speed: drawn at the moments between, not blended of two frames."""
    frames = round((tiny.NUM_FRAMES - 1) / speed) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "NUM_FRAMES", frames)  # which its whole motion takes
        video = tiny.draw(scene, np.random.default_rng(seed), frames)
    return _noisy(scene, seed, video[: tiny.NUM_FRAMES])


def _noisy(scene: tiny.Scene, seed: int, frames: np.ndarray) -> Sample:
    noise = 0.01 * np.random.default_rng(seed + 1).standard_normal(frames.shape)
    return Sample(scene.caption, seed, torch.zeros(1), np.clip(frames / 255 + noise, 0, 1).astype(np.float32))


def test_a_video_slowed_to_four_fifths_is_found_with_the_interval_at_twelve_pairs() -> None:
    pairs = [(filmed(scene, seed), slowed(scene, seed, 0.8)) for seed, scene in enumerate(SCENES)]
    assert len(pairs) == 12
    measured = [of_pair(b, a, True, Networks()) for a, b in pairs]
    for name, within in (("motion_speed", 0.03), ("shape_speed", 0.02)):
        found = estimate([Item(a.prompt, a.seed, each[name]) for (a, _), each in zip(pairs, measured, strict=True)])
        assert found.low < 0.8 + within
        assert found.high > 0.8 - within
        assert found.high < 0.9
        assert found.high - found.low < 0.06
    same = [of_pair(a, a, True, Networks())["motion_speed"] for a, _ in pairs]
    assert same == [1.0] * 12


def test_what_begins_late_and_what_stops_is_told() -> None:
    scene = SCENES[0]
    reference, late = filmed(scene, 3), filmed(scene, 3, late=5)
    found = motion.compare(reference.video, late.video)
    assert found["motion_onset"] == pytest.approx(5, abs=0.7)
    assert found["motion_speed"] == pytest.approx(11 / 16, abs=0.08)
    stopped = np.concatenate([reference.video[:9], np.repeat(reference.video[8:9], 8, axis=0)])
    assert motion.frozen_share(reference.video, stopped) == pytest.approx(0.5)
    assert motion.frozen_share(reference.video, reference.video) == 0.0
    still = np.repeat(reference.video[:1], 17, axis=0)
    gone = motion.compare(reference.video, still)
    assert gone["motion_speed"] == 0.0
    assert gone["motion_onset"] > 10
    assert gone["motion_spectrum"] == -100.0
    assert attributes.speed_ratio(reference.video, still) == pytest.approx(0.0, abs=0.02)
    # Where BF16 itself stands still, nothing is lost.
    assert motion.compare(still, still) == {"motion_speed": 1.0, "motion_onset": 0.0, "motion_spectrum": 0.0}


def test_gates_tell_slow_and_frozen_from_sound() -> None:
    scene = SCENES[1]
    reference = filmed(scene, 5)

    def failed(sample: Sample) -> set[str]:
        return {gate.name for gate in gates.check([sample], [reference]) if not gate.passed}

    assert failed(reference) == set()
    assert failed(slowed(scene, 5, 0.8)) == set()
    assert failed(slowed(scene, 5, 0.4)) == {"slow_motion"}
    video = reference.video
    stopped = np.concatenate([video[:11], np.repeat(video[10:11], 6, axis=0)])
    assert failed(Sample(scene.caption, 5, torch.zeros(1), stopped)) == {"frozen", "slow_motion"}


def soft(speed: float, contrast: float = 0.1) -> np.ndarray:
    """A smooth texture that fills the picture and moves to the right."""
    y, x = np.mgrid[:96, :96]
    waves = [(0.3, 17.0), (1.7, 23.0), (2.9, 31.0)]
    frames = []
    for time in range(17):
        at = x - speed * time
        frames.append(sum(np.sin(2 * np.pi * (at * np.cos(a) + y * np.sin(a)) / length) for a, length in waves) / 3)
    return np.repeat((0.5 + contrast * np.stack(frames))[..., None], 3, -1).astype(np.float32)


@pytest.mark.parametrize("speed", [0.3, 1.0, 3.0])
def test_soft_and_slow_motion_is_measured_too(speed: float) -> None:
    reference = soft(speed)
    for share in (0.9, 0.8, 0.5, 0.0):
        assert motion.speed_ratio(reference, soft(share * speed)) == pytest.approx(share, abs=0.03)


def test_a_video_is_measured_once_for_as_long_as_it_lives() -> None:
    calls = []

    def counted(video: np.ndarray) -> np.ndarray:
        calls.append(len(video))
        return motion.farneback(video)

    reference, video = soft(1.0), soft(0.5)
    first = motion.compare(reference, video, counted)
    assert motion.compare(reference, video, counted) == first
    assert len(calls) == 2
    before = len(motion._known)
    del reference, video
    assert len(motion._known) == before - 2


def test_jitter_has_more_of_the_fast_changes() -> None:
    video = filmed(SCENES[2], 7).video
    shaken = np.clip(video + 0.1 * np.random.default_rng(0).standard_normal(video.shape).astype(np.float32), 0, 1)
    assert motion.spectrum(video, shaken) > 3
    assert motion.spectrum(video, slowed(SCENES[2], 7, 0.5).video) < -1


def test_a_pixel_that_is_no_number_is_no_speed() -> None:
    video = filmed(SCENES[0], 1).video
    broken = video.copy()
    broken[3, 5, 5] = np.nan
    assert all(np.isnan(value) for value in motion.compare(video, broken).values())
    assert np.isnan(attributes.speed_ratio(video, broken))
    assert np.isnan(motion.frozen_share(video, broken))


def test_raft_where_its_weights_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real network with weights drawn at random: a flow of the video's own size; untrained, it says nothing."""
    from torchvision.models.optical_flow import raft_small

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert flow.settled("auto") == "farneback"
    with pytest.raises(ValueError, match="doctor fetch raft"):
        flow.settled("raft")
    path = tmp_path / "hub" / "checkpoints" / "raft_small_C_T_V2-01064c6d.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(raft_small(weights=None, progress=False).state_dict(), path)
    with pytest.raises(ValueError, match="01064c6d"):  # not the published file
        flow.settled("auto")
    monkeypatch.setattr(flow.weights, "checked", lambda names: {})
    assert flow.settled("auto") == "raft"
    networks = Networks.of(EvalConfig(lpips="off"), torch.device("cpu"))
    found = networks.flow(filmed(SCENES[0], 1).video[:3])
    assert found.shape == (2, 64, 64, 2)
    assert np.isfinite(found).all()
