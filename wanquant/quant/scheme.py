"""A quantization config, checked and parsed once into what the code uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from wanquant.choices import check_choices, did_you_mean
from wanquant.formats.base import Format
from wanquant.formats.registry import get_format
from wanquant.kernels import LARGEST_E4M3
from wanquant.quant.config import DEFAULT, QuantConfig
from wanquant.quant.scale import (
    Direct,
    Ema,
    Granularity,
    LeastError,
    PerBlock,
    PerRow,
    PerTensor,
    Rule,
    SearchedRule,
    parse_rule,
    quantize_matrix,
    static_scale,
)
from wanquant.quant.statistics import Site

#: Products of 8-bit codes, which weights are kept as.
EIGHT_BIT = ("fp8", "int8")
#: The formats whose values such a product multiplies; no others, whose values need not be E4M3's.
MULTIPLIED = {"fp8": ("hif8", "e4m3", "e5m2", "mxfp8"), "int8": ("int8",)}
#: BF16 values on the grid, float32 scales, and how many elements overflowed (int64 []; None: none could).
Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


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
    def coded(self) -> bool:
        """Whether weights are kept as codes: packed, or for a product of them."""
        return self.packed or self.product in EIGHT_BIT

    @cached_property
    def lifts(self) -> tuple[float, float]:
        """Powers of two, of weights and of inputs, by which values are multiplied to be carried by E4M3: so that what
        the target is rounded to is at most 448. 1 for what multiplies its own codes."""
        if self.product != "fp8" or self.format.block or self.format.name == "e4m3":
            return 1.0, 1.0
        targets = torch.tensor([getattr(rule, "target", 1.0) for rule in (self.weight_rule, self.act_rule)])
        weights, inputs = (LARGEST_E4M3 / self.format.round(targets, "saturate")).log2().floor().exp2().tolist()
        return weights, inputs

    @property
    def by_output(self) -> bool:
        """Whether a weight's scales are searched for by the error of the layer's output."""
        return isinstance(self.weight_rule, LeastError) and self.weight_rule.output

    @property
    def needs_statistics(self) -> bool:
        """Whether it takes more of calibration than the largest magnitude of each input."""
        searched = self.act_static and isinstance(self.act_rule, SearchedRule)
        return self.by_output or searched or self.smoothing is not None

    def input_scale(self, seen: float | Site | None, device: torch.device) -> torch.Tensor | None:
        """The scale of static activations, float32 []; None if they are dynamic."""
        if not self.act_static:
            return None
        assert seen is not None, "a static scheme needs a calibrated input"
        return static_scale(self.act_rule, seen, self.format, self.overflow).to(device)

    def quantize_input(
        self, rows: torch.Tensor, scale: torch.Tensor | None, factors: torch.Tensor | None = None
    ) -> Rounded:
        """Of a matrix [tokens, in], by a static ``scale`` or its own: [], [tokens] or [tokens, in / block].
        ``factors``, float32 [in], powers of two, multiply the columns first."""
        if scale is None:
            how = (self.act_granularity, self.act_rule, self.format, self.overflow)
            return quantize_matrix(rows, *how, factors)
        rounded, over = self.format.scaled_round(rows, scale, self.overflow, factors)
        return rounded, scale, over

    def quantize_weight(
        self, source: torch.Tensor, seen: float | Site | None = None, divisors: torch.Tensor | None = None
    ) -> Rounded:
        """Of a weight [out, in], by its own scales or by searched ones: [out], [] or [out, in / block]. ``seen`` is its
        input in calibration, ``divisors``, float32 [in], by what the channels of that have been divided since."""
        rule, whole, cost = self.weight_rule, isinstance(self.weight_granularity, PerTensor), None
        if not isinstance(rule, SearchedRule):
            return quantize_matrix(source, self.weight_granularity, rule, self.format, self.overflow)
        slices = source.reshape(1, -1) if whole else source
        if self.by_output:
            assert isinstance(seen, Site), "the error of the output needs what each channel did"
            cost = torch.from_numpy(seen.mean_square()).float().to(source.device)
            cost = cost if divisors is None else cost / divisors.square()
            cost = cost.expand(source.shape).reshape(slices.shape)
        scales = rule.of_rows(slices, cost, self.format, self.overflow)
        scales = scales[0] if whole else scales
        rounded, over = self.format.scaled_round(source, scales, self.overflow)
        return rounded, scales, over


def scheme_of(config: QuantConfig | Scheme | None) -> Scheme:
    """The scheme that a public function was given, or that of the config (of the default one for None)."""
    return config if isinstance(config, Scheme) else parse(config or QuantConfig())


def settle(config: QuantConfig) -> QuantConfig:
    """The config with the format's own choices where it says ``default``."""
    format_ = get_format(config.format)

    def choose(value: str, own: str) -> str:
        return own if value == DEFAULT else value

    rule = "mx" if format_.block else f"amax/{format_.target:g}"
    weight_rows, act_rows = ("per_block", "per_block") if format_.block else ("per_channel", "per_token")
    weights, act = config.weights, config.activations
    return replace(
        config,
        weights=replace(weights, granularity=choose(weights.granularity, weight_rows), rule=choose(weights.rule, rule)),
        activations=replace(act, granularity=choose(act.granularity, act_rows), rule=choose(act.rule, rule)),
        overflow=choose(config.overflow, format_.default_overflow),
    )


def parse(config: QuantConfig) -> Scheme:
    """``ValueError`` names the key at fault and what it may be."""
    check_choices(config, "quant.")
    config = settle(config)
    format_, weights, act = get_format(config.format), config.weights, config.activations
    _check_config(config, format_)
    weight_rule, act_rule = parse_rule(weights.rule, format_), parse_rule(act.rule, format_)
    _check_rules(config, format_, weight_rule, act_rule)
    scheme = Scheme(
        config=config,
        format=format_,
        weight_granularity=parse_granularity(weights.granularity, "per_channel", format_),
        weight_rule=weight_rule,
        act_granularity=parse_granularity(act.granularity, "per_token", format_),
        act_rule=act_rule,
        act_static=act.static,
        overflow=config.overflow,
        product=config.product,
        attention=config.attention,
        packed=config.packed,
        smoothing=config.smoothing,
    )
    assert scheme.lifts  # found now, and not while a model is traced
    return scheme


def _check_config(config: QuantConfig, format_: Format) -> None:
    """What the format cannot do, and what does not go together."""
    try:
        format_.check_overflow(config.overflow)
    except ValueError as error:
        raise ValueError(f"quant.overflow={config.overflow}: {error}") from None
    if config.product == "native" and config.format != "hif8":
        raise ValueError(f"quant.product=native: there is none for {config.format}")
    if config.product in EIGHT_BIT and config.format not in MULTIPLIED[config.product]:
        own = [product for product, formats in MULTIPLIED.items() if config.format in formats]
        known = ", ".join(MULTIPLIED[config.product])
        raise ValueError(
            f"quant.product={config.product} is for {known}: with {format_.name} choose {' or '.join(['fast', *own])}"
        )
    if config.attention != "off" and (format_.block or format_.keeps_all):
        raise ValueError(f"quant.attention={config.attention}: {format_.name} has no attention of its own")
    if config.activations.static and config.activations.granularity != "per_tensor":
        raise ValueError("quant.activations.static=true needs quant.activations.granularity=per_tensor")
    if config.smoothing is not None and not 0 <= config.smoothing <= 1:
        raise ValueError(f"quant.smoothing={config.smoothing}: must lie between 0 and 1, or be null for none")


def _check_rules(config: QuantConfig, format_: Format, weight_rule: Rule, act_rule: Rule) -> None:
    """What the rules cannot do, by what they are; a plug-in's may have a target and be of powers of two."""
    for side, rule in (("weights", weight_rule), ("activations", act_rule)):
        target: float = getattr(rule, "target", 0.0)
        if target >= format_.overflow:
            raise ValueError(f"quant.{side}.rule: target {target:g} is beyond the range of {format_.name}")
        if format_.block and not getattr(rule, "power_of_two", False):
            raise ValueError(f"quant.{side}.rule: the scales of {format_.name} are powers of two, choose mx or pow2")
        if config.product == "fp8" and config.format in ("hif8", "e5m2") and not target:
            other = f"quant.{side}.rule=amax/{format_.target:g}"
            raise ValueError(f"quant.product=fp8 carries {format_.name} up to a target: choose {other}")
    if isinstance(weight_rule, Ema):
        raise ValueError("quant.weights.rule=ema: a weight has no history, that rule is for static activations")
    if not isinstance(act_rule, SearchedRule):
        return
    text = config.activations.rule
    if not config.activations.static:
        raise ValueError(f"quant.activations.rule={text} is found in calibration: set quant.activations.static=true")
    if text == "mse_output":
        raise ValueError("quant.activations.rule=mse_output is for weights: choose mse")
    if config.smoothing is not None:
        raise ValueError(f"quant.smoothing changes what quant.activations.rule={text} was found on: choose amax")


def parse_granularity(text: str, rows: str, format_: Format) -> Granularity:
    """``per_tensor``, ``per_block`` or the name ``rows`` stands for: ``per_channel`` of weights, ``per_token`` of
    activations."""
    if text == "per_block" and format_.block:
        return PerBlock(format_.block)
    if format_.block:
        raise ValueError(f"{format_.name} has a scale for every {format_.block} elements: the granularity is per_block")
    if text == "per_tensor":
        return PerTensor()
    if text == rows:
        return PerRow()
    guess = did_you_mean(text, ("per_tensor", rows))
    raise ValueError(f"unknown granularity {text!r}: {guess}choose per_tensor or {rows}")
