"""What to quantize to: the strings a config holds, and the parsed scheme the code uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from wanquant.formats.registry import Format, get_format
from wanquant.quant.scale import Direct, Granularity, Rule, parse_granularity, parse_rule


@dataclass
class WeightConfig:
    granularity: str = "per_channel"
    rule: str = "amax/15"


@dataclass
class ActivationConfig:
    granularity: str = "per_token"
    rule: str = "amax/15"
    #: A static step comes from calibration and needs ``granularity=per_tensor``.
    static: bool = False


@dataclass
class QuantConfig:
    """The default is ``quant=hif8_w8a8``; see ``Scheme`` for what the strings mean."""

    name: str = "hif8_w8a8"
    format: str = "hif8"
    weights: WeightConfig = field(default_factory=WeightConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    #: ``inf`` or ``saturate``: what a magnitude beyond the format's range becomes.
    overflow: str = "inf"
    #: ``fast``: a BF16 product, scaled in float32; ``exact``: a float32 product, the reference.
    product: str = "fast"
    #: Keep weights as uint8 codes and decode them in every forward.
    packed: bool = False


@dataclass(frozen=True)
class Scheme:
    """A ``QuantConfig``, checked and parsed once. Keeps the config it came from, for checkpoints to name."""

    config: QuantConfig
    format: Format
    weight_granularity: Granularity
    weight_rule: Rule
    act_granularity: Granularity
    act_rule: Rule
    act_static: bool
    overflow: str
    product: str
    packed: bool

    @property
    def act_may_overflow(self) -> bool:
        """A step taken from the tensor itself keeps it in range; a fixed one may not."""
        return self.act_static or isinstance(self.act_rule, Direct)


def parse(config: QuantConfig) -> Scheme:
    """``ValueError`` names the key at fault and what it may be."""
    if config.overflow not in ("inf", "saturate"):
        raise ValueError(f"quant.overflow={config.overflow}: choose inf or saturate")
    if config.product not in ("fast", "exact"):
        raise ValueError(f"quant.product={config.product}: choose fast or exact")
    act = config.activations
    if act.static and act.granularity != "per_tensor":
        raise ValueError("quant.activations.static=true needs quant.activations.granularity=per_tensor")
    format_ = get_format(config.format)
    rules = {"weights": parse_rule(config.weights.rule), "activations": parse_rule(act.rule)}
    for side, rule in rules.items():
        if not isinstance(rule, Direct) and rule.target >= format_.overflow:
            raise ValueError(f"quant.{side}.rule: target {rule.target:g} is beyond the range of {format_.name}")
    return Scheme(
        config=config,
        format=format_,
        weight_granularity=parse_granularity(config.weights.granularity, rows="per_channel"),
        weight_rule=rules["weights"],
        act_granularity=parse_granularity(act.granularity, rows="per_token"),
        act_rule=rules["activations"],
        act_static=act.static,
        overflow=config.overflow,
        product=config.product,
        packed=config.packed,
    )
