"""A quantization config, checked and parsed once into what the code uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanquant.choices import check_choices
from wanquant.formats.base import Format
from wanquant.formats.registry import get_format
from wanquant.quant.config import DEFAULT, QuantConfig
from wanquant.quant.scale import (
    AmaxTo,
    Direct,
    Ema,
    Granularity,
    LeastError,
    Percentile,
    PerTensor,
    PowerOfTwo,
    Rule,
    SharedExponent,
    parse_granularity,
    parse_rule,
)


@dataclass(frozen=True)
class Scheme:
    """A ``QuantConfig``, checked and parsed once. Keeps the config, its defaults settled, for checkpoints to name."""

    config: QuantConfig
    format: Format
    weight_granularity: Granularity
    weight_rule: Rule
    act_granularity: Granularity
    act_rule: Rule
    act_static: bool
    overflow: str
    product: str
    attention: str
    packed: bool
    smoothing: float | None

    @property
    def independent(self) -> bool:
        """Whether the rounding of one row knows nothing of the others, so that videos can share a batch."""
        return self.act_static or isinstance(self.act_rule, Direct) or not isinstance(self.act_granularity, PerTensor)

    @property
    def needs_statistics(self) -> bool:
        """Whether it takes more of calibration than the largest magnitude of each input."""
        by_output = isinstance(self.weight_rule, LeastError) and self.weight_rule.output
        searched = self.act_static and isinstance(self.act_rule, Percentile | Ema | LeastError)
        return by_output or searched or self.smoothing is not None


def scheme_of(config: QuantConfig | Scheme | None) -> Scheme:
    """What a public function was given, parsed unless the caller has done so; the default for None."""
    return config if isinstance(config, Scheme) else parse(config or QuantConfig())


def settle(config: QuantConfig) -> QuantConfig:
    """The config with the format's own choices where it says ``default``."""
    format_ = get_format(config.format)

    def choose(value: str, own: str) -> str:
        return own if value == DEFAULT else value

    rule = "mx" if format_.block else f"amax/{format_.target:g}"
    rows = {side: "per_block" if format_.block else name for side, name in (("w", "per_channel"), ("a", "per_token"))}
    weights, act = config.weights, config.activations
    return replace(
        config,
        weights=replace(weights, granularity=choose(weights.granularity, rows["w"]), rule=choose(weights.rule, rule)),
        activations=replace(act, granularity=choose(act.granularity, rows["a"]), rule=choose(act.rule, rule)),
        overflow=choose(config.overflow, format_.default_overflow),
    )


def parse(config: QuantConfig) -> Scheme:
    """``ValueError`` names the key at fault and what it may be."""
    check_choices(config, "quant.")
    config = settle(config)
    format_ = get_format(config.format)
    try:
        format_.check_overflow(config.overflow)
    except ValueError as error:
        raise ValueError(f"quant.overflow={config.overflow}: {error}") from None
    if config.product == "native" and config.format != "hif8":
        raise ValueError(f"quant.product=native: there is none for {config.format}")
    if config.attention != "off" and (format_.block or format_.keeps_all):
        raise ValueError(f"quant.attention={config.attention}: {format_.name} has no attention of its own")
    weights, act = config.weights, config.activations
    if act.static and act.granularity != "per_tensor":
        raise ValueError("quant.activations.static=true needs quant.activations.granularity=per_tensor")
    if config.smoothing is not None and not 0 <= config.smoothing <= 1:
        raise ValueError(f"quant.smoothing={config.smoothing}: must lie between 0 and 1, or be null for none")
    rules = {"weights": parse_rule(weights.rule, format_), "activations": parse_rule(act.rule, format_)}
    for side, rule in rules.items():
        if isinstance(rule, AmaxTo | PowerOfTwo) and rule.target >= format_.overflow:
            raise ValueError(f"quant.{side}.rule: target {rule.target:g} is beyond the range of {format_.name}")
        if format_.block and not isinstance(rule, PowerOfTwo | SharedExponent):
            raise ValueError(f"quant.{side}.rule: the scales of {format_.name} are powers of two, choose mx or pow2")
        if isinstance(rule, Percentile | Ema) and rule.then.target >= format_.overflow:
            raise ValueError(f"quant.{side}.rule: target {rule.then.target:g} is beyond the range of {format_.name}")
    if isinstance(rules["weights"], Ema):
        raise ValueError("quant.weights.rule=ema: a weight has no history, that rule is for static activations")
    searched = isinstance(rules["activations"], Percentile | Ema | LeastError)
    if searched and not act.static:
        raise ValueError(
            f"quant.activations.rule={act.rule} is found in calibration: set quant.activations.static=true"
        )
    if act.rule == "mse_output":
        raise ValueError("quant.activations.rule=mse_output is for weights: choose mse")
    if searched and config.smoothing is not None:
        raise ValueError(f"quant.smoothing changes what quant.activations.rule={act.rule} was found on: choose amax")
    return Scheme(
        config=config,
        format=format_,
        weight_granularity=parse_granularity(weights.granularity, "per_channel", format_),
        weight_rule=rules["weights"],
        act_granularity=parse_granularity(act.granularity, "per_token", format_),
        act_rule=rules["activations"],
        act_static=act.static,
        overflow=config.overflow,
        product=config.product,
        attention=config.attention,
        packed=config.packed,
        smoothing=config.smoothing,
    )
