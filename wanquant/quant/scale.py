"""Scale rules: by which scale ``s`` is a tensor divided before it is rounded.

A scale is granularity × rule × static or dynamic. The choices come as strings, because that is
what a config can hold, and are parsed once into the small frozen classes below.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from wanquant import kernels
from wanquant.choices import did_you_mean
from wanquant.formats.base import Format


@dataclass(frozen=True)
class Direct:
    """s = 1: the format's own range has to do. The challenge's simulator; AMCT *Cast*."""

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isfinite(absmax), 1.0, torch.nan)


@dataclass(frozen=True)
class AmaxTo:
    """s = absmax / target: the largest magnitude lands on ``target``.

    15 and 16 keep a slice within HiF8's 3-bit-mantissa zone; OSP-Next (arXiv 2605.28691) takes 15,
    AMCT 16 (of the absolute maximum here; AMCT's is signed, which under-scales negative rows).
    """

    target: float
    power_of_two = False

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        return kernels.absmax_to_scale(absmax, self.target, False)


@dataclass(frozen=True)
class PowerOfTwo:
    """s = 2^k, the smallest that brings the largest magnitude to ``target`` or below.

    Scaling is then exact, and ``product=fast`` is as good as ``product=exact`` but for a bias, which is added
    to a product that was rounded already.
    """

    target: float
    power_of_two = True

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        return kernels.absmax_to_scale(absmax, self.target, True)


@dataclass(frozen=True)
class SharedExponent:
    """s = 2^(floor(log2 absmax) - floor(log2 max)), at least 2^-127: the rule of OCP Microscaling 1.0, section 6.3.

    The largest magnitude lands between the power of two below the format's maximum and the next one, so a part
    of it is beyond the maximum and saturates. ``max_exponent`` is 8 for E4M3, whose maximum is 448.
    """

    max_exponent: int

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        exponent = torch.frexp(absmax).exponent - 1 - self.max_exponent
        scale = kernels.two_to(exponent.clamp_min(-127))
        return torch.where(torch.isfinite(absmax), torch.where(absmax == 0, 1.0, scale), torch.nan)


#: From the largest magnitude of each slice (float32, any shape) to its scale, in the same shape. A slice of zeros
#: gets 1; one that is not finite gets NaN and turns NaN whole, so that a broken activation cannot look repaired.
PlainRule = Direct | AmaxTo | PowerOfTwo | SharedExponent


@dataclass(frozen=True)
class Percentile:
    """The magnitude that ``share`` of the elements do not exceed goes to ``then.target``; what is larger may clip."""

    share: float
    then: AmaxTo

    @property
    def name(self) -> str:
        return f"p{100 * self.share:g}"


@dataclass(frozen=True)
class Ema:
    """The running largest magnitude, 0.99 old and 0.01 new with every forward, to ``then.target``; AMCT *Quantile*."""

    then: AmaxTo
    name = "ema"


@dataclass(frozen=True)
class LeastError:
    """The scale of least squared error: of the tensor's own rounding, or with ``output`` of the layer's output;
    among powers of two (AMCT's OFMR) or quarters of octaves. ``wanquant.quant.search`` has the candidates."""

    output: bool
    powers: bool

    @property
    def name(self) -> str:
        return "ofmr" if self.powers else "mse_output" if self.output else "mse"


#: Those that need more than a largest magnitude are found by ``wanquant.quant.search``, never while running.
Rule = PlainRule | Percentile | Ema | LeastError


@dataclass(frozen=True)
class PerTensor:
    """One scale for all: [rows, columns] → []."""

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows.amax()

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PerRow:
    """One scale a row: [rows, columns] → [rows].

    Of a weight [out, in] that is *per-channel*, of activations [tokens, in] *per-token*.
    """

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (rows,)


@dataclass(frozen=True)
class PerBlock:
    """One scale for ``size`` elements in a row: [rows, columns] → [rows, columns / size]."""

    size: int

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        if columns % self.size:
            raise ValueError(f"rows of {columns} elements do not divide into blocks of {self.size}")
        return (rows, columns // self.size)


Granularity = PerTensor | PerRow | PerBlock
LEAST_ERROR = {
    "mse": LeastError(output=False, powers=False),
    "mse_output": LeastError(output=True, powers=False),
    "ofmr": LeastError(output=True, powers=True),
}


#: What a rule's name may be, percentiles aside.
RULES = ("direct", "amax", "pow2", "ema", *LEAST_ERROR, "mx")


def parse_rule(text: str, format_: Format) -> Rule:
    """``direct``, ``amax/15``, ``pow2/16``, ``p99.9/15``, ``ema/15``, ``mse``, ``mse_output``, ``ofmr``, ``mx``; the
    number behind the slash is the target, without one it is the format's own."""
    name, slash, target_text = text.partition("/")
    try:
        target = float(target_text) if slash else format_.target
    except ValueError:
        raise ValueError(f"scale rule {text!r}: the target {target_text!r} is not a number") from None
    if not 0 < target < float("inf"):
        raise ValueError(f"scale rule {text!r}: the target must be positive")
    if name == "direct" and not slash:
        return Direct()
    if name == "amax":
        return AmaxTo(target)
    if name == "pow2":
        return PowerOfTwo(target)
    if name == "ema":
        return Ema(AmaxTo(target))
    if name in LEAST_ERROR and not slash:
        return LEAST_ERROR[name]
    if name == "mx" and not slash:
        return SharedExponent(math.frexp(format_.target)[1] - 1)
    percent = re.fullmatch(r"p(\d+(\.\d+)?)", name)
    if percent and 0 < float(percent[1]) <= 100:
        return Percentile(float(percent[1]) / 100, AmaxTo(target))
    raise ValueError(
        f"unknown scale rule {text!r}: {did_you_mean(name, RULES)}"
        "choose direct, amax[/TARGET] (amax/15), pow2[/TARGET], pPERCENT[/TARGET] "
        f"(p99.9/15), ema[/TARGET], {', '.join(LEAST_ERROR)} or mx"
    )


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


def quantize_matrix(
    x: torch.Tensor,
    granularity: Granularity,
    rule: PlainRule,
    format_: Format,
    overflow: str,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Q(x / s) of a matrix as BF16 values on the grid, its scales s, and how many overflowed (None: none could).

    A scale taken from the slice itself keeps it in range, so then there is nothing to count. ``factors``, float32
    [columns], powers of two, multiply the columns first.
    """
    if factors is not None and (
        isinstance(granularity, PerTensor | PerBlock) or not isinstance(rule, AmaxTo | PowerOfTwo)
    ):
        x, factors = kernels.times(x, factors), None
    slices = x.reshape(-1, granularity.size) if isinstance(granularity, PerBlock) else x
    if isinstance(rule, AmaxTo | PowerOfTwo) and not isinstance(granularity, PerTensor):
        rounded, scale = format_.quantize_rows(slices, rule.target, rule.power_of_two, overflow, factors)
        over = None
    else:
        scale = rule(granularity.reduce(kernels.absmax_rows(slices)))
        rounded, over = format_.scaled_round(slices, scale, overflow)
    if isinstance(granularity, PerBlock):
        return rounded.view(x.shape), scale.view(len(x), -1), over
    return rounded, scale, over
