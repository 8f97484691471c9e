"""The public world of tiny-wan: what it can draw and how it is asked.

tiny-wan knows plain scenes only: one shape of one colour on a plain background, moving along one
axis. Everything a stranger needs to check it with a checker of their own is here: the palette, the
grammar, the sizes, and which combinations were held out of training.

Differs from a dataset card in that it is code: the drawing in ``wanquant.wan.scenes`` and the attribute metric
in ``wanquant.evaluate.attributes`` read the same constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

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
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
}
#: A square is axis-aligned; a triangle is upright, as wide as it is high.
SHAPES: tuple[str, ...] = ("square", "circle", "triangle")
#: Unit vector (x to the right, y downwards) of the motion.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

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
        color, shape = list(PALETTE).index(self.color), SHAPES.index(self.shape)
        direction = list(DIRECTIONS).index(self.direction)
        background = list(BACKGROUNDS).index(self.background)
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


def folder() -> Path:
    """Where the shipped weights are, in diffusers layout."""
    return Path(__file__).parent / "weights" / "tiny-wan"
