"""A quantization config, checked and parsed once into what the code uses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from wanquant.choices import check_choices, did_you_mean
from wanquant.formats.base import Format
from wanquant.formats.registry import get_format
from wanquant.kernels import LARGEST_E4M3, times
from wanquant.quant.checks import check
from wanquant.quant.config import CODED, DEFAULT, QuantConfig
from wanquant.quant.scale import (
    Direct,
    Granularity,
    LeastError,
    PerRow,
    PerTensor,
    Rule,
    SearchedRule,
    parse_rule,
    quantize_matrix,
    static_scale,
)
from wanquant.quant.statistics import Site
from wanquant.quant.steps import largest_by_bin

#: BF16 values on the grid, float32 scales, and how many elements overflowed (int64 []; None: none could).
Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Scheme:
    """A ``QuantConfig``, checked and parsed once. Keeps the config, its defaults settled, for checkpoints to name.
    ``format`` and ``overflow`` are of weights, ``act_format`` and ``act_overflow`` of activations."""

    config: QuantConfig
    format: Format
    act_format: Format
    weight_granularity: Granularity
    weight_rule: Rule
    act_granularity: Granularity
    act_rule: Rule
    act_static: bool
    act_steps: int
    overflow: str
    act_overflow: str
    product: str
    attention: str
    packed: bool
    smoothing: float | None
    rotation: int | None
    low_rank: int
    feedback: bool

    def __post_init__(self) -> None:
        assert self.lifts  # found now, and not while a model is traced

    @property
    def independent(self) -> bool:
        """Whether the rounding of one row knows nothing of the others, so that videos can share a batch."""
        return self.act_static or isinstance(self.act_rule, Direct) or not isinstance(self.act_granularity, PerTensor)

    @property
    def coded(self) -> bool:
        """Whether weights are kept as codes: packed, or for a product of them."""
        return self.packed or self.product in CODED

    @cached_property
    def lifts(self) -> tuple[float, float]:
        """Powers of two, of weights and of inputs, by which values are multiplied to be carried by E4M3: so that what
        the target is rounded to is at most 448. 1 for what multiplies its own codes."""
        if self.product != "fp8" or self.format.block or self.format.name == "e4m3":
            return 1.0, 1.0
        targets = torch.tensor([getattr(rule, "target", 1.0) for rule in (self.weight_rule, self.act_rule)])
        weights, inputs = (LARGEST_E4M3 / self.format.round(targets, "saturate")).log2().floor().exp2().tolist()
        return weights, inputs

    def packed_bytes(self, linear: nn.Linear) -> int:
        """Of its weight's codes, their scales and the branch beside them."""
        rows, columns = linear.out_features, linear.in_features
        scales = math.prod(self.weight_granularity.scale_shape(rows))
        branch = min(self.low_rank, rows, columns) * (rows + columns)
        return rows * self.format.row_bytes(columns) + 4 * scales + 2 * branch

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
        """The scale of static activations, float32 [], or one for each bin of denoising steps; None if they are
        dynamic."""
        if not self.act_static:
            return None
        assert seen is not None, "a static scheme needs a calibrated input"
        if self.act_steps > 1:
            assert isinstance(seen, Site)
            assert not isinstance(self.act_rule, SearchedRule)
            return self.act_rule(largest_by_bin(seen, self.act_steps)[0]).to(device)
        return static_scale(self.act_rule, seen, self.act_format, self.act_overflow).to(device)

    def quantize_input(
        self, rows: torch.Tensor, scale: torch.Tensor | None, factors: torch.Tensor | None = None
    ) -> Rounded:
        """Of a matrix [tokens, in], by a static ``scale`` or its own: [] or [tokens]. ``factors``, float32 [in], powers
        of two, multiply the columns first."""
        if self.act_format.keeps_all:
            kept = rows if factors is None else times(rows, factors)
            return kept.to(torch.bfloat16), torch.ones((), device=rows.device), None
        if scale is None:
            how = (self.act_granularity, self.act_rule, self.act_format, self.act_overflow)
            return quantize_matrix(rows, *how, factors)
        rounded, over = self.act_format.scaled_round(rows, scale, self.act_overflow, factors)
        return rounded, scale, over

    def quantize_weight(
        self, source: torch.Tensor, seen: float | Site | None = None, divisors: torch.Tensor | None = None
    ) -> Rounded:
        """Of a weight [out, in], by its own scales or by searched ones: [out] or []. ``seen`` is its input in
        calibration, ``divisors``, float32 [in], by what the channels of that have been divided since."""
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
    """The config with the formats' own choices where it says ``default``. ``overflow`` keeps saying so where those of
    weights and activations differ."""

    def choose(value: str, own: str) -> str:
        return own if value == DEFAULT else value

    weights, act = config.weights, config.activations
    name = choose(act.format, config.format)
    of_weights, of_inputs = get_format(config.format), get_format(name)
    rows = "per_tensor" if of_weights.block else "per_channel"
    tokens = "per_tensor" if of_inputs.block else "per_token"
    overflow, other = of_weights.default_overflow, of_inputs.default_overflow
    return replace(
        config,
        weights=replace(
            weights,
            granularity=choose(weights.granularity, rows),
            rule=choose(weights.rule, of_weights.default_rule()),
        ),
        activations=replace(
            act,
            format=name,
            granularity=choose(act.granularity, tokens),
            rule=choose(act.rule, of_inputs.default_rule()),
        ),
        overflow=choose(config.overflow, overflow if overflow == other else DEFAULT),
    )


def parse(config: QuantConfig) -> Scheme:
    """``ValueError`` names the key at fault and what it may be."""
    check_choices(config, "quant.")
    config = settle(config)
    weights, act = config.weights, config.activations
    of_weights, of_inputs = get_format(config.format), get_format(act.format)
    overflow, act_overflow = (
        each.default_overflow if config.overflow == DEFAULT else config.overflow for each in (of_weights, of_inputs)
    )
    scheme = Scheme(
        config=config,
        format=of_weights,
        act_format=of_inputs,
        weight_granularity=parse_granularity(weights.granularity, "per_channel"),
        weight_rule=parse_rule(weights.rule, of_weights),
        act_granularity=parse_granularity(act.granularity, "per_token"),
        act_rule=parse_rule(act.rule, of_inputs),
        act_static=act.static,
        act_steps=act.steps,
        overflow=overflow,
        act_overflow=act_overflow,
        product=config.product,
        attention=config.attention,
        packed=config.packed,
        smoothing=config.smoothing,
        rotation=config.rotation,
        low_rank=config.low_rank,
        feedback=weights.feedback,
    )
    check(scheme)
    return scheme


def parse_granularity(text: str, rows: str) -> Granularity:
    """``per_tensor``, or the name ``rows`` stands for: ``per_channel`` of weights, ``per_token`` of activations."""
    if text == "per_tensor":
        return PerTensor()
    if text == rows:
        return PerRow()
    if text == "per_block":
        raise ValueError("granularity per_block is gone, blocks are the format's own: convert such a checkpoint again")
    guess = did_you_mean(text, ("per_tensor", rows))
    raise ValueError(f"unknown granularity {text!r}: {guess}choose per_tensor or {rows}")
