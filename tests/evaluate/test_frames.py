"""The reader that stands in for decord gives decord's frames, to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import DECORD
from wanquant.evaluate.judges import frames
from wanquant.runs import pictures

#: Sizes that are no multiple of the codec's blocks, and a video of one frame.
SHAPES = [(17, 64, 64), (9, 270, 482), (1, 48, 96)]


@pytest.fixture(params=SHAPES, ids=str)
def video(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    count, height, width = request.param
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    pictures.write_mp4(tmp_path / "x.mp4", pixels, 8, crf=20)
    return tmp_path / "x.mp4"


@pytest.mark.skipif(not DECORD, reason="decord is not installed")
def test_frames_are_decords(video: Path) -> None:
    import decord

    for form in ("native", "torch"):
        decord.bridge.set_bridge(form)
        frames.bridge.set_bridge(form)
        theirs, ours = decord.VideoReader(str(video), num_threads=1), frames.VideoReader(str(video), num_threads=1)
        assert len(ours) == len(theirs)
        assert ours.get_avg_fps() == theirs.get_avg_fps()
        picked = [len(ours) - 1, 0, len(ours) // 2]
        asked = [(r.get_batch(range(len(r))), r.get_batch(picked), r[0]) for r in (ours, theirs)]
        for a, b in zip(*asked, strict=True):
            if form == "torch":
                assert a.dtype == b.dtype == torch.uint8
                assert torch.equal(a, b)
            else:
                assert np.array_equal(a.asnumpy(), b.asnumpy())
    decord.bridge.set_bridge("native")
    frames.bridge.set_bridge("native")


def test_what_it_cannot_do_it_refuses(video: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not scale"):
        frames.VideoReader(str(video), width=32, height=32)
    with pytest.raises(ValueError, match="native and torch"):
        frames.bridge.set_bridge("mxnet")
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"no\.mp4"):
        frames.VideoReader(str(tmp_path / "no.mp4"))


HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "decord":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
from wanquant.evaluate.judges.frames import stand_in
"""


@pytest.mark.slow
@pytest.mark.parametrize("video", SHAPES[:1], ids=str, indirect=True)
def test_it_stands_in_only_where_decord_is_missing(video: Path) -> None:
    code = f"import decord\nfrom decord import VideoReader, cpu\nprint(len(VideoReader({str(video)!r}, ctx=cpu(0))))"
    hidden = subprocess.run(
        [sys.executable, "-c", f"{HIDDEN}\nassert stand_in()\n{code}"], capture_output=True, text=True
    )
    assert hidden.returncode == 0, hidden.stderr
    assert int(hidden.stdout) == len(frames.VideoReader(str(video)))
    assert frames.stand_in() is not DECORD
