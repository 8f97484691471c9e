"""How an estimate of memory and time is told."""

from __future__ import annotations

from collections.abc import Mapping

from wanquant.quant import ConversionReport
from wanquant.quant.scheme import Scheme
from wanquant.wan.device import resident_memory
from wanquant.wan.resources.estimate import GUESS, ResourceEstimate

LEGEND = "P = protected, stays BF16; q = quantized; m = some of it quantized; - = nothing of it quantized"


def print_estimate(
    plan: ResourceEstimate, config_yaml: str, outside: Mapping[str, float] | None = None, told: str = ""
) -> None:
    """``outside`` are seconds of stages that are none of the plan's; ``told`` is where the weights wait."""
    counts = plan.report.counts()
    print(config_yaml)
    print(f"blocks      {block_map(plan.report)}   ({LEGEND})")
    print(f"rounding    {rounding(plan.scheme)}")
    print("linears     " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    print(f"transformer {plan.parameters:,} parameters, {in_bytes(2 * plan.parameters)} in BF16")
    print(f"checkpoint  transformer {in_bytes(plan.packed)}, {plan.packed / (2 * plan.parameters):.2f} of BF16")
    print_needs(plan, outside=outside, told=told)


def print_needs(
    plan: ResourceEstimate, what: str = "", outside: Mapping[str, float] | None = None, told: str = ""
) -> None:
    """Memory and time, of ``what`` where there are several."""
    counts, on_host = plan.counts, plan.device.type == "cpu"
    own = resident_memory(plan.device)
    if what:
        print(f"{what}:")
    if told:
        print(told)
    print(f"memory      {in_bytes(own + plan.added)}: {_parts(plan)}, the program itself {in_bytes(own)}")
    if not on_host and plan.videos:
        print(f"            {in_bytes(plan.videos)} on the host, for the videos until they are compared")
    if plan.recorded:
        print(f"disk        {in_bytes(plan.recorded)} in the cache, for BF16's denoising steps")
    if plan.hessian:
        count = len(plan.shape.blocks)
        kept = f"{in_bytes(plan.hessian * count)} in the cache, for error feedback"
        print(f"hessians    {kept}; {in_bytes(plan.hessian)} a block, {plan.hessian_blocks} of {count} at a time")
    done = f"{counts.bf16} videos denoised in BF16, {counts.quantized} quantized, {counts.decoded} decoded"
    if counts.replays_in_all:
        done += f", single steps of {counts.replays_in_all:.3g} more"
    stages = {**(outside or {})}
    for name, seconds in plan.stages.items():  # looks at a model in training are in both
        stages[name] = stages.get(name, 0.0) + seconds
    told = f"{in_time(sum(stages.values()))}: {done}, by a probe of the device; what the cache holds takes none"
    print(f"time        {told}{GUESS if plan.guess else ''}")
    for name, seconds in stages.items():
        print(f"            {name.replace('_', ' '):<20}{in_time(seconds):>10}")


def rounding(scheme: Scheme) -> str:
    """What ``default`` has become in the config."""
    weights, inputs = scheme.config.weights, scheme.config.activations
    if scheme.format.keeps_all:
        return f"none: weights {scheme.format.name}, inputs {scheme.act_format.name}"
    of_weights = ["weights " + scheme.format.name, weights.granularity, weights.rule]
    of_weights += ["error feedback"] if weights.feedback else []
    of_weights += [f"rank {scheme.low_rank} beside it"] if scheme.low_rank else []
    of_inputs = ["inputs " + scheme.act_format.name]
    if not scheme.act_format.keeps_all:
        bins = f", by {inputs.steps} bins of steps" if inputs.steps > 1 else ""
        of_inputs += [inputs.granularity, inputs.rule, f"static{bins}" if inputs.static else "dynamic"]
    of_inputs += [f"smoothed {scheme.smoothing}"] if scheme.smoothing else []
    of_inputs += [f"rotated by {scheme.rotation}"] if scheme.rotation else []
    of_inputs += [f"attention {scheme.attention}"] if scheme.attention != "off" else []
    return f"{', '.join(of_weights)}; {', '.join(of_inputs)}"


def _parts(plan: ResourceEstimate) -> str:
    on_host, streams = plan.device.type == "cpu", plan.offload != "none"
    if streams and not on_host:
        return "the most of a prompt's text encoder, of two blocks with what they compute, and of decoding"
    parts = {"weights": plan.weights + plan.others, "activations": plan.activations}
    beside = "quantized beside them, and videos" if on_host else "quantized beside them"
    parts[beside] = plan.added - sum(parts.values())
    return ", ".join(f"{name} {in_bytes(value)}" for name, value in parts.items() if value)


def block_map(report: ConversionReport) -> str:
    """One letter a block: ``PPqq...qqPPP``."""
    found: dict[int, set[str]] = {index: set() for index in range(report.blocks)}
    for module in report.modules:
        if module.block is not None:
            found[module.block].add(module.status)

    def letter(index: int) -> str:
        if index in report.protected_blocks:
            return "P"
        return "q" if found[index] == {"converted"} else "m" if "converted" in found[index] else "-"

    return "".join(map(letter, found))


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def in_time(seconds: float) -> str:
    """In seconds below two minutes, and so on up."""
    if seconds < 120:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    for unit, size, most in (("min", 60, 120), ("h", 3600, 48), ("days", 86400, 730)):
        if seconds < most * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds / (365.25 * 86400):.1f} years"
