"""Does tiny-wan follow its prompts? Colour, shape, background and direction, by plain image analysis.

    python tools/check_tiny_wan.py

Generates videos for (prompt, seed) pairs it was not trained on, half of them of held-out
combinations, and prints the four accuracies with their intervals. Exit status 1 below a bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from wanquant import load_pipeline
from wanquant.evaluate.attributes import ATTRIBUTES, score
from wanquant.evaluate.stats import Item, estimate
from wanquant.runs.pictures import contact_sheet, to_uint8, write_png
from wanquant.runs.progress import progress
from wanquant.wan import tiny
from wanquant.wan.checkpoints.find import find_folder, read_generation
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import generate
from wanquant.wan.load import hush_libraries

BARS = {"color": 0.95, "shape": 0.85, "direction": 0.95, "background": 0.95}
FIRST_SEED = 50_000


def choose_pairs(count: int) -> list[tuple[tiny.Scene, int]]:
    """(scene, seed), half of held-out combinations, spread over all others by a fixed shuffle."""
    if count < 2:
        raise ValueError("at least 2 videos are needed, one of them of a held-out combination")
    rng = np.random.default_rng(2026)
    groups = [[s for s in tiny.all_scenes() if s.held_out], [s for s in tiny.all_scenes() if not s.held_out]]
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in groups]
    return [(shuffled[i % 2][i // 2 % len(shuffled[i % 2])], FIRST_SEED + i) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a folder in diffusers layout")
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--steps", type=int, help="denoising steps (default: those of generation.json)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 24 videos to this PNG")
    args = parser.parse_args()
    hush_libraries()
    try:
        settings = GenerationConfig(**read_generation(find_folder(args.model)))
        if args.steps is not None:
            settings = dataclasses.replace(settings, steps=args.steps)
        pipe, pairs = load_pipeline(args.model), choose_pairs(args.videos)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    with progress("generate", len(pairs) * settings.steps) as tick:
        samples = generate(pipe, [(scene.caption, seed) for scene, seed in pairs], settings, tick)
    scores = [score(sample.video, scene) for sample, (scene, _) in zip(samples, pairs, strict=True)]
    held_out = np.array([scene.held_out for scene, _ in pairs])
    print(f"{len(pairs)} videos, {held_out.sum()} of held-out combinations, {settings.steps} steps")
    missed = []
    for name in ATTRIBUTES:
        values = np.array([s[name] for s in scores])
        e = estimate([Item(scene.caption, seed, v) for (scene, seed), v in zip(pairs, values, strict=True)])
        passed = e.mean >= BARS[name]
        missed += [] if passed else [name]
        print(
            f"{name:<11} {100 * e.mean:5.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]   "
            f"seen {100 * values[~held_out].mean():5.1f} %, held out {100 * values[held_out].mean():5.1f} %   "
            f"bar {100 * BARS[name]:.0f} %: {'passed' if passed else 'MISSED'}"
        )
    if args.sheet:
        try:
            write_png(args.sheet, contact_sheet([(s.prompt, (("", to_uint8(s.video)),)) for s in samples[:24]]))
        except OSError as error:
            parser.error(f"cannot write {args.sheet}: {error}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
