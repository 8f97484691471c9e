"""Scale rules: by which step ``s`` is a tensor divided before it is rounded.

A scale is granularity × rule × static or dynamic. The choices come as strings, because that is
what a config can hold, and are parsed once into the small frozen classes below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Direct:
    """s = 1: the format's own range has to do. The challenge's simulator; AMCT *Cast*."""

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        return _guard(absmax, torch.ones_like(absmax))


@dataclass(frozen=True)
class AmaxTo:
    """s = absmax / target: the largest magnitude lands on ``target``.

    15 and 16 keep a slice within HiF8's 3-bit-mantissa zone; OSP-Next (arXiv 2605.28691) takes 15,
    AMCT 16 (of the absolute maximum here; AMCT's is signed, which under-scales negative rows).
    """

    target: float

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        return _guard(absmax, absmax / self.target)


@dataclass(frozen=True)
class PowerOfTwo:
    """s = 2^k, the smallest that brings the largest magnitude to ``target`` or below.

    Scaling is then exact, and ``product=fast`` is as good as ``product=exact`` but for a bias, which is added
    to a product that was rounded already.
    """

    target: float

    def __call__(self, absmax: torch.Tensor) -> torch.Tensor:
        # frexp, not log2, which is wrong just below powers of two: x = m 2^e with 0.5 <= m < 1.
        mantissa, exponent = torch.frexp(absmax / self.target)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        return _guard(absmax, torch.ldexp(torch.ones_like(absmax), exponent))


#: From the largest magnitude of each slice (float32, any shape) to its step, in the same shape.
Rule = Direct | AmaxTo | PowerOfTwo


def _guard(absmax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """1 for a slice of zeros (or one whose step would vanish), NaN for a slice that is not finite.

    NaN on purpose: the whole slice turns NaN, so that a broken activation cannot look repaired.
    """
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.where(torch.isfinite(absmax), scale, torch.nan)


@dataclass(frozen=True)
class PerTensor:
    """One step for all: [rows, columns] → []."""

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows.amax()


@dataclass(frozen=True)
class PerRow:
    """One step a row: [rows, columns] → [rows].

    Of a weight [out, in] that is *per-channel*, of activations [tokens, in] *per-token*.
    """

    def reduce(self, absmax_of_rows: torch.Tensor) -> torch.Tensor:
        return absmax_of_rows


Granularity = PerTensor | PerRow
DEFAULT_TARGET = 15.0


def parse_rule(text: str) -> Rule:
    """``direct``, ``amax/15``, ``amax/16``, ``pow2`` or ``pow2/16``; the number is the target."""
    name, _, target_text = text.partition("/")
    try:
        target = float(target_text) if target_text else DEFAULT_TARGET
    except ValueError:
        raise ValueError(f"scale rule {text!r}: the target {target_text!r} is not a number") from None
    if not 0 < target < float("inf"):
        raise ValueError(f"scale rule {text!r}: the target must be positive")
    if name == "direct" and not target_text:
        return Direct()
    if name == "amax" and target_text:
        return AmaxTo(target)
    if name == "pow2":
        return PowerOfTwo(target)
    raise ValueError(f"unknown scale rule {text!r}: choose direct, amax/TARGET (amax/15) or pow2[/TARGET]")


def parse_granularity(text: str, rows: str) -> Granularity:
    """``per_tensor`` or the name ``rows`` stands for: ``per_channel`` of weights, ``per_token`` of activations."""
    if text == "per_tensor":
        return PerTensor()
    if text == rows:
        return PerRow()
    raise ValueError(f"unknown granularity {text!r}: choose per_tensor or {rows}")
