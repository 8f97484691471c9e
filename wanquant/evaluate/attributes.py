"""What a tiny-wan video shows, by plain image analysis: colour, shape, background, direction of motion.

No learned model, so nothing here can flatter a network. Everything is measured in a few robust
steps: the border of the picture is the background, what differs from it is the shape, how much of
its bounding box it fills says which shape (1 for a square, pi/4 for a circle, 1/2 for a triangle),
and where its centre goes says the direction.
"""

from __future__ import annotations

import numpy as np

from wanquant.evaluate import motion
from wanquant.wan.tiny import BACKGROUNDS, DIRECTIONS, MIN_TRAVEL, PALETTE, Scene

ATTRIBUTES = ("color", "shape", "direction", "background")
#: A pixel belongs to the shape if its colour differs from the background's by this (of 255, Euclidean).
CONTRAST = 40.0
#: A named colour must be met within this distance (of 255, Euclidean); the palette's closest two are 110 apart.
TOLERANCE = 75.0
#: Least share of the picture that is a shape (the smallest triangle covers 0.059), and the largest.
AREA = (0.02, 0.5)
#: Fill ratios between triangle, circle and square. Drawn, they are 0.54 to 0.6, 0.75 to 0.83 and 1; a codec rounds
#: corners, and of videos through tiny-wan's VAE they are 0.6 to 0.7, 0.78 to 0.84 and 0.93 to 0.95.
TRIANGLE_CIRCLE, CIRCLE_SQUARE = 0.72, 0.87
#: Least fill ratio of a shape (scattered pixels fill less), and the most its box may be longer than wide: all three
#: shapes have a square one.
LEAST_FILL, MOST_OBLONG = 0.45, 1.25


def nearest(color: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str | None:
    """The name of the colour in ``table`` closest to ``color`` (RGB, 0..255), if it is close enough."""
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in table.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= TOLERANCE else None


def measure(video: np.ndarray) -> dict[str, str | None]:
    """Attribute → what the video shows, or None where it shows nothing of the kind.

    ``video`` is [frames, height, width, 3] in 0..1.
    """
    pixels = np.asarray(video, dtype=np.float64) * 255.0
    if not np.isfinite(pixels).all():
        return dict.fromkeys(ATTRIBUTES)
    background, shown, masks, color = _seen(pixels)
    found: dict[str, str | None] = {"background": nearest(background, BACKGROUNDS)}
    if color is None:
        return {"color": None, "shape": None, "direction": None, **found}
    found["color"] = nearest(color, PALETTE)
    found["shape"] = _shape([mask for mask, ok in zip(masks, shown, strict=True) if ok])
    found["direction"] = _direction(masks, shown)
    return {name: found[name] for name in ATTRIBUTES}


def _seen(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Colour of the background; which frames show a shape, where it is in each, and its colour, None if too few do."""
    border = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :, :2].reshape(-1, 3), pixels[:, :, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    masks = np.linalg.norm(pixels - background, axis=-1) > CONTRAST
    share = masks.mean(axis=(1, 2))
    shown = (share >= AREA[0]) & (share <= AREA[1])
    if shown.sum() < len(pixels) / 2:
        return background, shown, masks, None
    color = np.median(pixels[masks & shown[:, None, None]], axis=0)
    # Again, now that the colour is known: inside is what is closer to it than to the background,
    # so that a soft edge is cut at its middle whatever the contrast.
    axis = color - background
    return background, shown, (pixels - background) @ axis > 0.5 * axis @ axis, color


def _shape(masks: list[np.ndarray]) -> str | None:
    """By the medians over frames of area / bounding box and of the box's sides; None for what is none of the three.

    Rows and columns of a single pixel are strays.
    """
    fills, aspects = [], []
    for mask in masks:
        rows, columns = np.nonzero(mask.sum(1) >= 2)[0], np.nonzero(mask.sum(0) >= 2)[0]
        if len(rows) and len(columns):
            height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            fills.append(mask.sum() / (height * width))
            aspects.append(height / width)
    if not fills:
        return None
    fill, aspect = float(np.median(fills)), float(np.median(aspects))
    if fill < LEAST_FILL or not 1 / MOST_OBLONG <= aspect <= MOST_OBLONG:
        return None
    return "triangle" if fill < TRIANGLE_CIRCLE else "circle" if fill < CIRCLE_SQUARE else "square"


def _direction(masks: np.ndarray, shown: np.ndarray) -> str | None:
    """The axis along which the centre moves farthest, by a least-squares line over the frames that show it."""
    found = _travel(masks, shown)
    if found is None or max(map(abs, found)) < MIN_TRAVEL / 2:
        return None
    dx, dy = found
    moved = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    return next(name for name, vector in DIRECTIONS.items() if vector == moved)


def _travel(masks: np.ndarray, shown: np.ndarray) -> tuple[float, float] | None:
    """How far the centre moves from the first frame to the last, right and down, by a least-squares line over the
    frames that show it."""
    frames = np.nonzero(shown & masks.any((1, 2)))[0]
    if len(frames) < 2:
        return None
    centres = np.array([[np.nonzero(masks[f])[1].mean(), np.nonzero(masks[f])[0].mean()] for f in frames])
    dx, dy = np.polyfit(frames, centres, 1)[0] * (len(masks) - 1)
    return float(dx), float(dy)


def speed_ratio(reference: np.ndarray, video: np.ndarray) -> float:
    """Of the tracked shape, ours to the reference's: 0 where ours shows none, 1 where the reference's does not move."""
    theirs, ours = (_speed(each) for each in (reference, video))
    return motion.ratio(ours, theirs, MIN_TRAVEL / 4)


def _speed(video: np.ndarray) -> float:
    """Pixels from the first frame to the last; 0 where no shape is seen."""
    if not np.isfinite(video).all():
        return float("nan")
    _, shown, masks, color = _seen(np.asarray(video, dtype=np.float64) * 255.0)
    travel = _travel(masks, shown) if color is not None else None
    return float(np.hypot(*travel)) if travel is not None else 0.0


def score(video: np.ndarray, scene: Scene) -> dict[str, float]:
    """1 for each attribute the video shows as asked, else 0; and ``attributes``, their mean."""
    shown = measure(video)
    hits = {name: float(shown[name] == getattr(scene, name)) for name in ATTRIBUTES}
    return {**hits, "attributes": float(np.mean(list(hits.values())))}
