"""The ladder of proxies: does a cheap measure rank a sweep's configurations as an expensive one does?

Where it does, the expensive one need not be taken for every candidate. The cheapest is the noise of each block alone,
which needs a single BF16 pass over the calibration prompts; then single denoising steps along BF16's trajectories;
then the final latents; then pixels; then judges. It is
Spearman's rank correlation over configurations, with an interval from drawing them with replacement: of few
configurations it says little, and then the interval says that; of fewer than ``DRAWN`` there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wanquant.evaluate.stats import rank_correlation
from wanquant.runs.reports.columns import DRIFT, STEP_SQNR

#: From the cheapest up.
CHEAP = ("block_sqnr", STEP_SQNR, DRIFT, "psnr")
#: The measures that a small value is good of are turned, so that agreement is 1 everywhere.
EXPENSIVE = ("ssim", "lpips", "error_flicker", "attributes")
LESS_IS_BETTER = ("lpips", "error_flicker")
#: Fewer configurations have no ladder; an interval over fewer than ``MANY`` is hardly one.
FEW, MANY = 3, 8
#: Fewer have no interval: four are in the same order by chance once in 24 times, and drawn with replacement they are
#: then in that order every time.
DRAWN = 5


def ladder(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """``rungs``: a measure each, with its correlations by cheap measure, or None where one of the two is constant; each
    with its bounds, NaN where there are none."""
    known = [name for name in (STEP_SQNR, DRIFT, "psnr") if any(name in row["metrics"] for row in rows)]
    sound = [row for row in rows if all(math.isfinite(_mean(row, name)) for name in known)]
    if len(sound) < FEW:
        return None
    names = [name for name in sound[0]["metrics"] if all(math.isfinite(_mean(row, name)) for row in sound)]
    cheap = [name for name in CHEAP if name in names]
    judged = [name for name in names if name.startswith("vbench.")]
    rungs = []
    further = [name for name in (*CHEAP[1:], *EXPENSIVE) if name in names]
    for name in [*further, *judged]:
        below = cheap[: cheap.index(name)] if name in cheap else cheap
        if below:
            rungs.append({"name": name, "correlations": {other: _correlated(sound, other, name) for other in below}})
    if not rungs:
        return None
    return {"configurations": len(sound), "few": len(sound) < MANY, "cheap": cheap, "rungs": rungs}


def _mean(row: dict[str, Any], name: str) -> float:
    """Turned where less is better; NaN where there is none."""
    mean = row["metrics"].get(name, {}).get("mean")
    return math.nan if mean is None else -float(mean) if name in LESS_IS_BETTER else float(mean)


def _correlated(rows: Sequence[dict[str, Any]], a: str, b: str) -> list[float] | None:
    found = rank_correlation([_mean(row, a) for row in rows], [_mean(row, b) for row in rows])
    if math.isnan(found[0]):
        return None
    return list(found) if len(rows) >= DRAWN else [found[0], math.nan, math.nan]
