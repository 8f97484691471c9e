"""Each gate on a video made to fail it, and all of them on good ones."""

from __future__ import annotations

import numpy as np
import pytest

from tools.tiny_wan.scenes import draw
from wanquant.evaluate.gates import check
from wanquant.wan.tiny import all_scenes

GOOD = draw(all_scenes()[7], np.random.default_rng(0)).astype(np.float32) / 255


def failed(video: np.ndarray, reference: np.ndarray = GOOD) -> set[str]:
    return {gate.name for gate in check([reference, video], [reference, reference]) if not gate.passed}


def test_quiet_on_good_videos() -> None:
    rng = np.random.default_rng(1)
    assert failed(GOOD) == set()
    assert failed(np.clip(GOOD + rng.normal(0, 0.02, GOOD.shape), 0, 1)) == set()
    for scene in all_scenes()[::31]:
        video = draw(scene, rng).astype(np.float32) / 255
        assert failed(video * 0.97, video) == set()


@pytest.mark.parametrize(
    ("gate", "video"),
    [
        ("finite", np.where(np.arange(GOOD.size).reshape(GOOD.shape) == 5, np.nan, GOOD)),
        ("black", np.zeros_like(GOOD)),
        ("constant", np.full_like(GOOD, GOOD.mean())),
        ("static", np.repeat(GOOD[:1], len(GOOD), 0)),
        ("color_shift", np.clip(GOOD + np.array([0.4, 0, 0]), 0, 1)),
        ("noise", np.random.default_rng(0).random(GOOD.shape)),
    ],
)
def test_each_fails_what_it_is_for(gate: str, video: np.ndarray) -> None:
    assert gate in failed(video.astype(np.float32))


def test_the_worst_item_is_named() -> None:
    gates = {gate.name: gate for gate in check([GOOD, np.zeros_like(GOOD)], [GOOD, GOOD])}
    assert gates["black"].worst == 1
    assert gates["black"].figure == 0.0
