"""Does calibration on still pictures make static scales worse than calibration on videos?

    python -m benchmarks.still_calibration [--quants static_per_tensor,percentile] [--pairs pairs24]

Users report that a Wan calibrated on images loses motion once it is quantized. For each preset of static scales,
tiny-wan is calibrated on the pairs of ``calib=pairs20`` as videos, and on single frames of the same prompts and seeds.
No block is protected. Both are measured on other prompts, pair by pair: by single denoising steps, final latents, and
the speed of what moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from wanquant.config import CONF
from wanquant.evaluate.compare import measure
from wanquant.evaluate.single_steps import measure_steps, record
from wanquant.evaluate.stats import Item, compared, difference, estimate
from wanquant.ptq.calibrator import Calibrator
from wanquant.ptq.plan import PTQPlan, resolve, with_weights
from wanquant.ptq.sensitivity import quantized
from wanquant.runs.cache import Cache
from wanquant.runs.reports.columns import STEP_SQNR, estimate_text, head
from wanquant.runs.reports.table import markdown
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.model_files import fingerprint
from wanquant.wan.load import hush_libraries, load_pipeline

SHOWN = (STEP_SQNR, "step_sqnr_33", "latent_sqnr", "motion_speed", "shape_speed")


def plan_of(*overrides: str) -> PTQPlan:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = OmegaConf.to_object(compose("ptq", ["protect=none", "calib=pairs20", *overrides]))
    return with_weights(resolve(config))  # type: ignore[arg-type]


def measured(plan: PTQPlan, pipeline: CachedPipeline, frames: int) -> dict[str, list[Item]]:
    """The preset's metrics, calibrated on videos of so many frames."""
    generation = dataclasses.replace(pipeline.model.generation, num_frames=frames)
    calibrated_on = dataclasses.replace(pipeline, model=dataclasses.replace(pipeline.model, generation=generation))
    calibrator = Calibrator(calibrated_on, plan.scheme, list(plan.calibration))
    pairs, stats = list(plan.pairs), calibrator.inputs()
    counted = {**calibrator.what_is_quantized(()), "calibration_frames": frames}
    trajectories = record(pipeline, pairs, plan.config.eval.single_steps)
    baseline = pipeline.videos("BF16", pairs, pipeline.latents("BF16", pairs)[0])
    with quantized(pipeline.transformer, plan.scheme, (), (), stats):
        found = {each.name: measure_steps(each, counted).items() for each in trajectories}
        latents = pipeline.latents("quantized", pairs, counted)[0]
    samples = pipeline.videos("quantized", pairs, latents)
    return found | measure({"": list(zip(baseline, samples, strict=True))}, plan.config.model.language == "scenes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quants", default="static_per_tensor,percentile")
    parser.add_argument("--pairs", default="pairs24", help="preset of prompts to measure on")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, as for ptq.py")
    parser.add_argument("--cache", type=Path, help="where BF16 videos are kept (default: nowhere)")
    args = parser.parse_args()
    hush_libraries()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for quant in args.quants.split(","):
            plan = plan_of(f"quant={quant}", f"prompts={args.pairs}", *args.set)
            pipe, files = load_pipeline(plan.model.files, str(plan.device)), plan.model.files
            cache = Cache(args.cache or Path(scratch))
            pipeline = CachedPipeline(pipe, plan.config.model, fingerprint(files), plan.device, cache)
            own = pipeline.model.generation.num_frames
            videos, stills = (measured(plan, pipeline, frames) for frames in (own, 1))
            for name in (name for name in SHOWN if name in videos):
                change = compared(difference(stills[name], videos[name]))
                cells = [
                    estimate_text(each.as_json()) for each in (*map(estimate, (videos[name], stills[name])), change)
                ]
                rows.append([quant, head(name), *cells])
    print(markdown(["quant", "", "calibrated on videos", "on single frames", "difference, paired"], rows))


if __name__ == "__main__":
    main()
