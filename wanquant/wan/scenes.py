"""Draws the captioned videos tiny-wan is trained on.

A shape is drawn by the signed distance to its outline: coverage = clip(0.5 - distance, 0, 1), one
pixel of anti-aliasing, which is what lets a sub-pixel motion look like motion.
"""

from __future__ import annotations

import numpy as np

from wanquant.wan.tiny import (
    BACKGROUNDS,
    DIRECTIONS,
    HEIGHT,
    MIN_TRAVEL,
    NUM_FRAMES,
    PALETTE,
    RADIUS,
    WIDTH,
    Scene,
)


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

    The motion is uniform; over ``NUM_FRAMES`` frames it covers at least ``MIN_TRAVEL`` pixels and
    never leaves the picture. Fewer frames show the beginning of the same motion.
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
