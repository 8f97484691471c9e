"""Scale rules: by which scale ``s`` is a tensor divided before it is rounded.

A scale is granularity × rule × static or dynamic. The choices come as strings, because that is what a config can hold,
and are parsed once into the small frozen classes below. A *plain* rule is a callable from largest magnitudes to scales;
``register_scale_rule`` adds one. A *searched* rule needs more than a largest magnitude, so it never runs with the
model: of a weight it looks at the weight itself, of an activation, which has one scale for all then, at what
calibration recorded.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from wanquant import kernels
from wanquant.choices import did_you_mean
from wanquant.formats.base import Format
from wanquant.quant.statistics import Site

#: From the largest magnitude of each slice (float32, any shape) to its scale, in the same shape. A slice of zeros
#: gets 1; one that is not finite gets NaN and turns NaN whole, so that a broken activation cannot look repaired.
PlainRule = Callable[[torch.Tensor], torch.Tensor]


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
        return kernels.absmax_to_scale(absmax, self.target, self.power_of_two)


class PowerOfTwo(AmaxTo):
    """s = 2^k, the smallest that brings the largest magnitude to ``target`` or below.

    Scaling is then exact, and ``product=fast`` is as good as ``product=exact`` but for a bias, which is added
    to a product that was rounded already.
    """

    power_of_two = True


@dataclass(frozen=True)
class SearchedRule(ABC):
    """Finds scales before the model runs."""

    name: str

    def of_rows(self, rows: torch.Tensor, cost: torch.Tensor | None, format_: Format, overflow: str) -> torch.Tensor:
        """Scales of the rows of a weight, float32 [rows]; NaN for a row that is not finite. ``cost``, in the shape of
        ``rows``, weighs squared errors, if the rule minimizes those."""
        raise AssertionError(f"{self.name} is no rule for weights, and parse refuses it")

    @abstractmethod
    def of_site(self, site: Site, format_: Format, overflow: str) -> torch.Tensor:
        """The one scale of an activation, float32 []."""


@dataclass(frozen=True)
class Percentile(SearchedRule):
    """The magnitude that ``share`` of the elements do not exceed goes to ``target``; what is larger may clip."""

    share: float
    target: float

    def of_rows(self, rows: torch.Tensor, cost: torch.Tensor | None, format_: Format, overflow: str) -> torch.Tensor:
        magnitudes = rows.float().abs()
        place = max(1, math.ceil(self.share * rows.shape[1]))
        scales = AmaxTo(self.target)(magnitudes.kthvalue(place, dim=1).values)
        # An infinity or a NaN may lie above the percentile and must not be overlooked.
        return torch.where(magnitudes.amax(1).isfinite(), scales, torch.nan)

    def of_site(self, site: Site, format_: Format, overflow: str) -> torch.Tensor:
        return AmaxTo(self.target)(torch.tensor(site.view().quantile(self.share)))


@dataclass(frozen=True)
class Ema(SearchedRule):
    """The running largest magnitude, 0.99 old and 0.01 new with every forward, to ``target``; AMCT *Quantile*."""

    target: float

    def of_site(self, site: Site, format_: Format, overflow: str) -> torch.Tensor:
        return AmaxTo(self.target)(torch.tensor(site.ema()))


@dataclass(frozen=True)
class LeastError(SearchedRule):
    """The scale of least squared error: ``mse`` of the tensor's own rounding, ``mse_output`` of the layer's output,
    ``ofmr`` of that among powers of two from 2^-5 to 2^5 (AMCT's OFMR).

    The first two try absmax / (target · 2^(j/4)), j from -16 to 16. The error of a weight that counts for the output
    is weighed by the mean square of the channel it multiplies: with rounding errors of different channels unrelated to
    each other, that is the error of the layer's output.
    """

    @property
    def output(self) -> bool:
        return self.name != "mse"

    def candidates(self, absmax: torch.Tensor, format_: Format, overflow: str) -> torch.Tensor:
        """Scales to try, float32 [candidates, *absmax.shape]; targets out of range only if overflow saturates."""
        if self.name == "ofmr":
            powers = kernels.two_to(torch.arange(-5, 6, device=absmax.device))
            return powers.view(-1, *[1] * absmax.ndim).expand(-1, *absmax.shape)
        targets = [format_.target * 2 ** (j / 4) for j in range(-16, 17)]
        kept = [target for target in targets if overflow == "saturate" or target < format_.overflow]
        return torch.stack([AmaxTo(target)(absmax) for target in kept])

    def of_rows(self, rows: torch.Tensor, cost: torch.Tensor | None, format_: Format, overflow: str) -> torch.Tensor:
        absmax, wide = kernels.absmax_rows(rows), rows.float()
        best = torch.full_like(absmax, torch.inf)
        scales = torch.full_like(absmax, torch.nan)
        for scale in self.candidates(absmax, format_, overflow):
            rounded, _ = format_.scaled_round(rows, scale, overflow)
            error = (rounded.float() * scale[:, None] - wide).square()
            total = (error if cost is None else error * cost).sum(1)
            better = total < best
            best, scales = torch.where(better, total, best), torch.where(better, scale, scales)
        return scales

    def of_site(self, site: Site, format_: Format, overflow: str) -> torch.Tensor:
        largest, view = torch.tensor(site.largest()), site.view()
        tried = self.candidates(largest, format_, overflow)
        noise = [view.noise(float(scale), format_, overflow) for scale in tried]
        finite = [value if math.isfinite(value) else math.inf for value in noise]
        if min(finite) == math.inf:  # NaN passed, or nothing is in range
            return torch.tensor(torch.nan if not math.isfinite(float(largest)) else float(tried[-1]))
        return tried[finite.index(min(finite))]


Rule = PlainRule | SearchedRule
#: What makes a rule for a target, by name; ``register_scale_rule`` adds to them.
TARGETED: dict[str, Callable[[float], Rule]] = {"amax": AmaxTo, "pow2": PowerOfTwo, "ema": partial(Ema, "ema")}
#: Rules without a target.
FIXED: dict[str, Rule] = {"direct": Direct(), **{name: LeastError(name) for name in ("mse", "mse_output", "ofmr")}}
PERCENT = re.compile(r"p(\d+(\.\d+)?)")


def register_scale_rule(name: str, make: Callable[[float], PlainRule]) -> None:
    """Adds a rule, which ``quant.activations.rule=NAME/TARGET`` and ``quant.weights.rule=NAME`` then find.

    ``make(target)`` gives a ``PlainRule``. If that has a ``target``, it must lie within the format's range.
    ``ValueError`` for a name that is taken or has a slash.
    """
    if name in TARGETED or name in FIXED or PERCENT.fullmatch(name):
        raise ValueError(f"there is a scale rule {name!r} already: choose another name")
    if not name or "/" in name:
        raise ValueError(f"a scale rule cannot be named {name!r}: a slash divides name and target")
    TARGETED[name] = make


def parse_rule(text: str, format_: Format) -> Rule:
    """``direct``, ``amax/15``, ``pow2/16``, ``p99.9/15``, ``ema/15``, ``mse``, ``mse_output``, ``ofmr``, or a
    registered one; the number behind the slash is the target, without one it is the format's own."""
    name, slash, target_text = text.partition("/")
    try:
        target = float(target_text) if slash else format_.target
    except ValueError:
        raise ValueError(f"scale rule {text!r}: the target {target_text!r} is not a number") from None
    if not 0 < target < float("inf"):
        raise ValueError(f"scale rule {text!r}: the target must be positive")
    if name in TARGETED:
        return TARGETED[name](target)
    if name in FIXED and not slash:
        return FIXED[name]
    percent = PERCENT.fullmatch(name)
    if percent and 0 < float(percent[1]) <= 100:
        return Percentile(f"p{float(percent[1]):g}", float(percent[1]) / 100, target)
    added = [f"{known}[/TARGET]" for known in TARGETED if known not in ("amax", "pow2")]
    raise ValueError(
        f"unknown scale rule {text!r}: {did_you_mean(name, ('direct', *TARGETED, *FIXED))}"
        "choose direct, amax[/TARGET] (amax/15), pow2[/TARGET], pPERCENT[/TARGET] "
        f"(p99.9/15), {', '.join([*added, *[*FIXED][1:-1]])} or {[*FIXED][-1]}"
    )


class Granularity(ABC):
    """How many elements share a scale."""

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        """From the largest magnitude of each row to that of what shares a scale."""
        return absmax_of_rows

    @abstractmethod
    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Of a matrix of so many rows."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all: [rows, columns] → []."""

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows.amax()

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale a row: [rows, columns] → [rows].

    Of a weight [out, in] that is *per-channel*, of activations [tokens, in] *per-token*.
    """

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        return (rows,)


def static_scale(rule: Rule, seen: float | Site, format_: Format, overflow: str) -> torch.Tensor:
    """The one scale of an activation, float32 []. ``ValueError`` if the rule needs more than a largest magnitude."""
    if not isinstance(rule, SearchedRule):
        return rule(torch.tensor(seen.largest() if isinstance(seen, Site) else float(seen)))
    if not isinstance(seen, Site):
        raise ValueError(f"the scale rule {rule.name} needs full calibration statistics, not a largest magnitude")
    return rule.of_site(seen, format_, overflow)


def quantize_matrix(
    x: torch.Tensor,
    granularity: Granularity,
    rule: Rule,
    format_: Format,
    overflow: str,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Q(x / s) of a matrix as BF16 values on the grid, its scales s, and how many overflowed (None: none could).

    A scale taken from the slice itself keeps it in range, so then there is nothing to count. ``factors``, float32
    [columns], powers of two, multiply the columns first.
    """
    assert not isinstance(rule, SearchedRule), "parse lets none be dynamic"
    if isinstance(rule, Direct) and format_.block:  # whose own scales tell what is not finite
        one = torch.ones((), device=x.device)
        rounded, over = format_.scaled_round(x, one, overflow, factors)
        return rounded, one, over
    # Not what a plug-in derives from them.
    fused = rule if isinstance(rule, AmaxTo) and type(rule) in (AmaxTo, PowerOfTwo) else None
    if factors is not None and not (isinstance(granularity, PerRow) and fused is not None):
        x, factors = kernels.times(x, factors), None
    if fused is not None and not isinstance(granularity, PerTensor):
        return *format_.quantize_rows(x, fused.target, fused.power_of_two, overflow, factors), None
    scale = rule(granularity.reduce(kernels.absmax_rows(x)))
    rounded, over = format_.scaled_round(x, scale, overflow)
    return rounded, scale, over
