"""How fast things move, when they begin to, and how the motion looks over time: quantized beside BF16.

Quantized video models are known for frames that look fine while the motion is slow, late or gone, which no figure of
single frames sees.

``motion_speed``     of what moves, ours over BF16's: 1 as fast, 0.8 slowed to that, 0 frozen
``motion_onset``     how many frames later than BF16's it has covered a tenth of BF16's way
``motion_spectrum``  10 log10 of the temporal power above half the highest frequency, ours to BF16's, in dB: below 0
                     smoother or slower, above it jittery
``shape_speed``      as ``motion_speed``, of tiny-wan's shape, which is tracked (``wanquant.evaluate.attributes``)

Speed is that of the optical flow, RAFT's where its weights are there and Farnebäck's otherwise, weighted by the squared
change of each pixel once its neighbours are averaged with it, so that what moves counts and a plain background hardly
does. Noise that BF16's video has not got disturbs it: of 3 % of the range, by a tenth on average.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import numpy as np

#: Frames [frames, height, width, 3] in 0..1 to their displacements [frames - 1, height, width, 2], in pixels.
Flow = Callable[[np.ndarray], np.ndarray]
#: Frames are brought to this shorter side, if they are larger, before their flow is taken.
SIDE = 256
#: Standard deviation in pixels of the blur behind which change is looked for.
BLUR = 1.0
#: Pixels a frame below which nothing moves, and the largest ratio that is told.
STILL, MOST = 0.02, 10.0
#: Share of BF16's way that is the onset.
BEGUN = 0.1


def farneback(video: np.ndarray) -> np.ndarray:
    """Dense flow of Farnebäck (2003), OpenCV's."""
    import cv2

    pixels = [np.round(255 * np.clip(frame, 0, 1)).astype(np.uint8) for frame in video]
    gray = [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in pixels]
    start = np.zeros((*gray[0].shape, 2), np.float32)
    return np.stack(
        [
            np.asarray(cv2.calcOpticalFlowFarneback(a, b, start.copy(), 0.5, 3, 15, 3, 5, 1.1, 0))
            for a, b in itertools.pairwise(gray)
        ]
    )


#: By video and flow: what is compared with several others, or judged by a gate too, is measured once.
_known: dict[tuple[int, Flow], np.ndarray] = {}


def speeds(video: np.ndarray, flow: Flow = farneback) -> np.ndarray:
    """Pixels a frame of what moves, [frames - 1]; 0 where nothing changes, NaN where a pixel is not finite. Kept for as
    long as the video is."""
    key = (id(video), flow)
    if key not in _known:
        _known[key] = _speeds(video, flow)
        weakref.finalize(video, _known.pop, key, None)
    return _known[key]


def _speeds(video: np.ndarray, flow: Flow) -> np.ndarray:
    if not np.isfinite(video).all():
        return np.full(len(video) - 1, np.nan)
    import cv2

    video = _smaller(video)
    smooth = np.stack([cv2.GaussianBlur(frame, (0, 0), BLUR) for frame in video])
    weights = np.square(np.abs(np.diff(smooth, axis=0)).sum(-1))
    total = weights.sum((1, 2))
    magnitude = np.hypot(*np.moveaxis(flow(video), -1, 0))
    found: np.ndarray = (magnitude * weights).sum((1, 2)) / np.where(total > 0, total, 1.0)
    return found


def _smaller(video: np.ndarray) -> np.ndarray:
    import cv2

    height, width = video.shape[1:3]
    scale = SIDE / min(height, width)
    if scale >= 1:
        return video
    size = (round(width * scale), round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video])


def compare(reference: np.ndarray, video: np.ndarray, flow: Flow = farneback) -> dict[str, float]:
    """The first three of the figures above."""
    theirs, ours = speeds(reference, flow), speeds(video, flow)
    return {
        "motion_speed": ratio(float(ours.mean()), float(theirs.mean())),
        "motion_onset": onset(np.cumsum(ours), np.cumsum(theirs)),
        "motion_spectrum": spectrum(reference, video),
    }


def speed_ratio(reference: np.ndarray, video: np.ndarray) -> float:
    """``motion_speed`` by Farnebäck's flow."""
    return ratio(float(speeds(video).mean()), float(speeds(reference).mean()))


def ratio(ours: float, theirs: float, still: float = STILL) -> float:
    """At most ``MOST``; 1 where neither moves, NaN where one is not known. What moves by less stands ``still``."""
    if np.isnan(ours) or np.isnan(theirs):
        return float("nan")
    return min(MOST, ours / max(theirs, still)) if max(ours, theirs) > still else 1.0


def onset(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Frames between the moments at which these ways, summed up frame by frame, pass ``BEGUN`` of the latter's whole;
    0 where that is none."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("nan")
    if theirs[-1] <= STILL * len(theirs):
        return 0.0
    level = BEGUN * theirs[-1]
    return _passes(ours, level) - _passes(theirs, level)


def _passes(way: np.ndarray, level: float) -> float:
    """The moment in frames, between two by a straight line; the last one if it never does."""
    place = int(np.searchsorted(way, level))
    if place == len(way):
        return float(len(way))
    before = way[place - 1] if place else 0.0
    return place + float((level - before) / (way[place] - before))


def spectrum(reference: np.ndarray, video: np.ndarray) -> float:
    """dB within 100 of 0; 0 where neither has any."""
    ours, theirs = _fast_power(video), _fast_power(reference)
    if np.isnan(ours) or np.isnan(theirs):
        return float("nan")
    if ours == theirs:
        return 0.0
    return float(np.clip(10 * (np.log10(max(ours, 1e-30)) - np.log10(max(theirs, 1e-30))), -100, 100))


def _fast_power(video: np.ndarray) -> float:
    if not np.isfinite(video).all():
        return float("nan")
    smaller = _smaller(video)
    power = np.square(np.abs(np.fft.rfft(smaller - smaller.mean(0), axis=0))).sum((1, 2, 3))
    return float(power[-(len(power) // 2) :].sum())


def frozen_share(reference: np.ndarray, video: np.ndarray) -> float:
    """Of the frames in which the reference changes, the share in which the video does by less than a tenth of it."""
    ours, theirs = (np.sqrt(np.square(np.diff(each, axis=0)).mean((1, 2, 3))) for each in (video, reference))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("nan")
    moving = theirs > max(1e-3, 0.2 * float(np.median(theirs)))
    return float((ours < 0.1 * theirs)[moving].mean()) if moving.any() else 0.0
