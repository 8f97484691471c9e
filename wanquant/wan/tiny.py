"""The public world of tiny-wan: what it can draw, how it is asked, and the videos it was trained on.

tiny-wan knows plain scenes only: one shape of one colour on a plain background, moving along one axis. All that an
independent checker needs is here: the palette, the grammar, the sizes, which combinations were held out of training,
and the drawing. ``wanquant.evaluate.attributes`` reads the same constants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

#: RGB, 0 to 255, of the colour a shape can have.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 190),
    "cyan": (60, 200, 215),
}
#: RGB, 0 to 255, of the plain background.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (15,) * 3, "gray": (128,) * 3, "white": (240,) * 3}
#: A square is axis-aligned; a triangle is upright, as wide as it is high.
SHAPES: tuple[str, ...] = ("square", "circle", "triangle")
#: Unit vector (x to the right, y downwards) of the motion.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

HEIGHT = WIDTH = 64
NUM_FRAMES = 17
#: Half the side of a shape's bounding box, in pixels, drawn uniformly from this range.
RADIUS = (11.0, 14.0)
#: Least distance, in pixels, that a shape travels between the first and the last frame.
MIN_TRAVEL = 24.0


@dataclass(frozen=True)
class Scene:
    """One combination of attributes; ``str`` values are keys of the tables above."""

    color: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        return caption(self.color, self.shape, self.direction, self.background)

    @property
    def held_out(self) -> bool:
        """True for the 36 of 216 combinations that no training video shows.

        For each (shape, direction, background) one colour is held out, and every pair of
        attributes still occurs in training, so a model that composes can draw them.
        """
        attributes = (self.color, self.shape, self.direction, self.background)
        tables: tuple[Iterable[str], ...] = (PALETTE, SHAPES, DIRECTIONS, BACKGROUNDS)
        color, shape, direction, background = (list(t).index(v) for t, v in zip(tables, attributes, strict=True))
        return (color + shape + direction + 2 * background) % len(PALETTE) == 0


def caption(color: str, shape: str, direction: str, background: str) -> str:
    """The one sentence of the grammar, at most 52 bytes: the prompt tiny-wan was trained on."""
    return f"a {color} {shape} moving {direction} on a {background} background"


def all_scenes() -> list[Scene]:
    """All 216 combinations, in the order of the tables."""
    return [Scene(*values) for values in product(PALETTE, SHAPES, DIRECTIONS, BACKGROUNDS)]


def parse_caption(text: str) -> Scene:
    """The scene a caption of this grammar asks for; ``ValueError`` for any other sentence."""
    by_caption = {scene.caption: scene for scene in all_scenes()}
    try:
        return by_caption[" ".join(text.split())]
    except KeyError:
        raise ValueError(f"not a tiny-wan caption: {text!r} (the grammar is wanquant.wan.tiny.caption)") from None


#: Models that ship, by ``model.path``: trained with forty blocks from the first step, and grown from ten.
SHIPPED = {"tiny": "tiny-wan", "tiny-grown": "tiny-grown"}


def folder(path: str = "tiny") -> Path:
    """Where the shipped weights are, in diffusers layout."""
    return Path(__file__).parent / "weights" / SHIPPED[path]


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) to a shape whose bounding box is 2·radius wide."""
    if shape == "square":
        return np.asarray(np.maximum(np.abs(dx), np.abs(dy)) - radius)
    if shape == "circle":
        return np.asarray(np.hypot(dx, dy) - radius)
    # Apex at (0, -radius), base from (-radius, radius) to (radius, radius).
    side = (2.0 * np.abs(dx) - (dy + radius)) / np.sqrt(5.0)
    return np.asarray(np.maximum(side, dy - radius))


def draw(scene: Scene, rng: np.random.Generator, frames: int = NUM_FRAMES) -> np.ndarray:
    """One video, uint8 [frames, 64, 64, 3]: size, place and speed from ``rng``, the rest from the scene.

    Coverage of a pixel is clip(0.5 - signed distance to the outline, 0, 1), one pixel of anti-aliasing, which lets a
    sub-pixel motion look like motion. The motion is uniform; over ``NUM_FRAMES`` frames it covers at least
    ``MIN_TRAVEL`` pixels and never leaves the picture. Fewer frames show the beginning of the same motion.
    """
    radius = rng.uniform(*RADIUS)
    low, high = radius, WIDTH - radius
    travel = rng.uniform(MIN_TRAVEL, high - low)
    start_along = rng.uniform(low, high - travel)
    across = rng.uniform(low, high)
    ux, uy = DIRECTIONS[scene.direction]
    along = start_along + travel * np.arange(frames) / (NUM_FRAMES - 1)
    if ux + uy < 0:
        along = WIDTH - along
    cx, cy = (along, np.full(frames, across)) if ux else (np.full(frames, across), along)
    dx = np.arange(WIDTH)[None, None, :] + 0.5 - cx[:, None, None]
    dy = np.arange(HEIGHT)[None, :, None] + 0.5 - cy[:, None, None]
    dx, dy = np.broadcast_arrays(dx, dy)
    cover = np.clip(0.5 - distance(scene.shape, dx, dy, radius), 0.0, 1.0)[..., None]
    pixels = cover * np.array(PALETTE[scene.color]) + (1.0 - cover) * np.array(BACKGROUNDS[scene.background])
    return np.asarray(np.round(pixels), np.uint8)
