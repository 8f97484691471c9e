from __future__ import annotations

import numpy as np
import pytest

from wanquant.evaluate.attributes import measure, score
from wanquant.wan.tiny import DIRECTIONS, MIN_TRAVEL, PALETTE, SHAPES, Scene, all_scenes, caption, draw, parse_caption


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_drawn_videos_score_full_marks(noise: float) -> None:
    rng = np.random.default_rng(0)
    for scene in all_scenes()[:: 5 if noise else 1]:
        video = draw(scene, rng) / 255.0
        assert score(np.clip(video + rng.normal(0, noise, video.shape), 0, 1), scene)["attributes"] == 1.0, scene


def test_each_attribute_is_told_from_its_others() -> None:
    scene = Scene("red", "square", "left", "black")
    video = draw(Scene("red", "circle", "down", "white"), np.random.default_rng(0)) / 255.0
    assert score(video, scene) == {"color": 1.0, "shape": 0.0, "direction": 0.0, "background": 0.0, "attributes": 0.25}


def test_empty_and_broken_videos_show_nothing() -> None:
    assert set(measure(np.full((17, 64, 64, 3), 0.5)).values()) == {None, "gray"}
    assert set(measure(np.full((17, 64, 64, 3), np.nan)).values()) == {None}
    still = np.repeat(draw(all_scenes()[0], np.random.default_rng(0), 1) / 255.0, 17, axis=0)
    assert measure(still)["direction"] is None


def test_what_is_none_of_the_shapes_is_none() -> None:
    video = np.full((17, 64, 64, 3), 0.06)
    oblong, dots = video.copy(), video.copy()
    oblong[:, 10:40, 20:38, 0] = 0.8
    dots[np.random.default_rng(0).random((17, 64, 64)) < 0.1] = (0.8, 0.15, 0.15)
    for broken in (oblong, dots):
        shown = measure(broken)
        assert shown["shape"] is None
        assert shown["background"] == "black"


def test_captions_are_the_grammar() -> None:
    scenes = all_scenes()
    assert len({scene.caption for scene in scenes}) == 216
    assert all(parse_caption(scene.caption) == scene for scene in scenes)
    assert caption("red", "circle", "up", "gray") == "a red circle moving up on a gray background"
    with pytest.raises(ValueError, match="not a tiny-wan caption: 'a red dog'"):
        parse_caption("a red dog")


def test_held_out_combinations_leave_every_pair_in_training() -> None:
    training = [scene for scene in all_scenes() if not scene.held_out]
    assert len(training) == 180
    assert {(s.color, s.shape, s.direction) for s in training} == {
        (c, s, d) for c in PALETTE for s in SHAPES for d in DIRECTIONS
    }


def test_shapes_stay_in_frame_and_travel() -> None:
    rng = np.random.default_rng(3)
    for scene in all_scenes()[::5]:
        video = draw(scene, rng).astype(int)
        background = video[0, 0, 0]
        ink = np.abs(video - background).sum((1, 2, 3))
        # Wholly in frame: nothing is ever cut off, so the shape's ink stays the same.
        assert ink.max() / ink.min() < 1.01
        mask = np.abs(video - background).sum(-1) > 60
        first, last = (np.argwhere(mask[i]).mean(0) for i in (0, -1))
        assert np.abs(last - first).max() > MIN_TRAVEL - 1
