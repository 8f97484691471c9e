"""What of a quantization config does not go together; every message names the key at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanquant.quant.config import MULTIPLIED
from wanquant.quant.rotate import check_size
from wanquant.quant.scale import Direct, Ema, LeastError, SearchedRule

if TYPE_CHECKING:
    from wanquant.quant.scheme import Scheme


def check(scheme: Scheme) -> None:
    """``ValueError`` names the key at fault and what it may be."""
    _check_formats(scheme)
    _check_product(scheme)
    _check_rules(scheme)
    _check_rotation(scheme)
    _check_steps(scheme)


def _check_formats(scheme: Scheme) -> None:
    """What the formats cannot do."""
    config, act_format = scheme.config, scheme.act_format
    for format_, overflow in ((scheme.format, scheme.overflow), (act_format, scheme.act_overflow)):
        try:
            format_.check_overflow(overflow)
        except ValueError as error:
            raise ValueError(f"quant.overflow={overflow}: {error}") from None
    methods = {
        "weights.feedback=true": scheme.feedback,
        f"rotation={scheme.rotation}": scheme.rotation is not None,
        f"low_rank={scheme.low_rank}": scheme.low_rank > 0,
        f"smoothing={scheme.smoothing}": scheme.smoothing is not None,
    }
    for key, asked in methods.items():
        if asked and scheme.format.keeps_all:
            raise ValueError(f"quant.{key}: {scheme.format.name} rounds no weights")
    if scheme.format.keeps_all and not act_format.keeps_all:
        nothing = f"quant.format={scheme.format.name} quantizes nothing, leave it out"
        raise ValueError(f"quant.activations.format={act_format.name}: {nothing}")
    if config.attention != "off" and (act_format.block or act_format.keeps_all):
        raise ValueError(
            f"quant.attention={config.attention}: inputs in {act_format.name} have no attention of their own"
        )
    if config.activations.static and act_format.keeps_all:
        raise ValueError(f"quant.activations.static=true: {act_format.name} has no scales")
    if config.activations.static and config.activations.granularity != "per_tensor":
        raise ValueError("quant.activations.static=true needs quant.activations.granularity=per_tensor")
    own = (act_format.default_rule(), "per_token")
    if act_format.keeps_all and (config.activations.rule, config.activations.granularity) != own:
        raise ValueError(f"quant.activations: {act_format.name} has no scales, leave out rule and granularity")
    if config.activations.static and act_format.block and isinstance(scheme.act_rule, Direct):
        raise ValueError(f"quant.activations.static=true: {act_format.name} has no scale but the blocks', give a rule")
    if config.smoothing is not None and not 0 <= config.smoothing <= 1:
        raise ValueError(f"quant.smoothing={config.smoothing}: must lie between 0 and 1, or be null for none")


def _check_product(scheme: Scheme) -> None:
    """What the product does not multiply."""
    product, name, act_name = scheme.product, scheme.format.name, scheme.act_format.name
    if product in ("fast", "exact"):
        return
    if name != act_name:
        raise ValueError(f"quant.product={product}: there is none of {name} with {act_name}, choose fast or exact")
    if product == "native" and name != "hif8":
        raise ValueError(f"quant.product=native: there is none for {name}")
    if product in MULTIPLIED and name not in MULTIPLIED[product]:
        own = [product for product, formats in MULTIPLIED.items() if name in formats]
        known = ", ".join(MULTIPLIED[product])
        raise ValueError(f"quant.product={product} is for {known}: with {name} choose {' or '.join(['fast', *own])}")
    if product not in MULTIPLIED:
        return
    config, format_ = scheme.config, scheme.format
    for side, rule, text, granularity in (
        ("weights", scheme.weight_rule, config.weights.rule, config.weights.granularity),
        ("activations", scheme.act_rule, config.activations.rule, config.activations.granularity),
    ):
        if product == "fp4" and granularity != "per_tensor":
            raise ValueError(f"quant.{side}.granularity={granularity}: fp4 has one scale for all, choose per_tensor")
        if ((product == "fp8" and format_.block) or name == "mxfp4") and not isinstance(rule, Direct):
            raise ValueError(f"quant.{side}.rule={text}: {product} takes no scales but the blocks', choose direct")
        if product == "fp8" and name in ("hif8", "e5m2") and not getattr(rule, "target", 0.0):
            other = f"quant.{side}.rule=amax/{format_.target:g}"
            raise ValueError(f"quant.product=fp8 carries {name} up to a target: choose {other}")


def _check_rules(scheme: Scheme) -> None:
    """What the rules cannot do, by what they are; a plug-in's may have a target."""
    config, act_rule = scheme.config, scheme.act_rule
    sides = (("weights", scheme.weight_rule, scheme.format), ("activations", act_rule, scheme.act_format))
    for side, rule, format_ in sides:
        target: float = getattr(rule, "target", 0.0)
        if target >= format_.overflow:
            raise ValueError(f"quant.{side}.rule: target {target:g} is beyond the range of {format_.name}")
    if isinstance(scheme.weight_rule, Ema):
        raise ValueError("quant.weights.rule=ema: a weight has no history, that rule is for static activations")
    if not isinstance(act_rule, SearchedRule):
        return
    text = config.activations.rule
    if not config.activations.static:
        raise ValueError(f"quant.activations.rule={text} is found in calibration: set quant.activations.static=true")
    if text == "mse_output":
        raise ValueError("quant.activations.rule=mse_output is for weights: choose mse")
    if isinstance(act_rule, LeastError) and scheme.act_format.block:
        raise ValueError(f"quant.activations.rule={text}: errors of blocks are not in the statistics, choose amax")
    if config.smoothing is not None:
        raise ValueError(f"quant.smoothing changes what quant.activations.rule={text} was found on: choose amax")


def _check_rotation(scheme: Scheme) -> None:
    """What calibration has recorded of channels is not of rotated ones."""
    check_size(scheme.rotation)
    if scheme.low_rank < 0:
        raise ValueError(f"quant.low_rank={scheme.low_rank}: must be a rank, or 0 for none")
    if scheme.rotation is None:
        return
    for key, asked in (
        ("quant.activations.static=true", scheme.act_static),
        (f"quant.weights.rule={scheme.config.weights.rule}", scheme.by_output),
    ):
        if asked:
            raise ValueError(
                f"quant.rotation={scheme.rotation}: {key} was found on inputs before rotation, leave it out"
            )


def _check_steps(scheme: Scheme) -> None:
    """Calibration has recorded nothing by denoising step but largest magnitudes."""
    steps, rule = scheme.act_steps, scheme.config.activations.rule
    if steps < 1:
        raise ValueError(f"quant.activations.steps={steps}: must be at least 1")
    if steps > 1 and not scheme.act_static:
        raise ValueError(f"quant.activations.steps={steps} is of static scales: set quant.activations.static=true")
    if steps > 1 and isinstance(scheme.act_rule, SearchedRule | Direct):
        raise ValueError(f"quant.activations.steps={steps}: {rule} is not found by step, choose amax or pow2")
    if steps > 1 and scheme.config.smoothing is not None:
        raise ValueError(f"quant.smoothing changes what quant.activations.steps={steps} was found on: leave one out")
