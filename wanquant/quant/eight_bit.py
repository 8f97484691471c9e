"""Products of 8-bit codes: ``product=fp8`` on the FP8 units of a card, ``product=int8`` on its whole-number units.

    y = s_x · s_w · (codes of Q(x / s_x) · codes of Q(w / s_w)ᵀ) + b

E4M3 and INT8 multiply their own codes. HiF8 and E5M2 are *carried*: their values times a power of two, the lift, which
brings the target of the scale rule below 448, are E4M3's, all but those below 2^-6 of E4M3 that are no multiples of
2^-9. What is lost so is counted, in weights and inputs. The lift goes into the scales, where it is exact.

Where there are no such units, as on the CPU, the same codes are multiplied in BF16: what such a product makes of a
model's quality can be measured anywhere. On a card FP8 units sum with fewer bits than float32 has, and the scales are
applied before the only rounding; sums are torch's fast ones (measured on an H200: an error of 0.54 % where the accurate
ones have 0.52 %, and the rounding to HiF8 itself 3.5 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

from wanquant import kernels
from wanquant.kernels import CODED_E4M3, CODED_HIF8, CODED_INT8, LARGEST_E4M3, eager
from wanquant.quant import block_codes
from wanquant.quant.config import CODED
from wanquant.quant.scale import AmaxTo, PerRow, PowerOfTwo
from wanquant.quant.scheme import Scheme

#: By format, the codes that one pass over an input makes of it.
KINDS = {"hif8": CODED_HIF8, "e4m3": CODED_E4M3, "int8": CODED_INT8}
#: Formats whose values E4M3 carries.
CARRIED = ("hif8", "e5m2")
#: Compute capability of the first cards with a product of E4M3, and with one of MXFP8.
SINCE, SINCE_MX = (8, 9), (10, 0)
#: What ``_carried`` and ``_as_bf16`` have found; dictionaries, because torch.compile sees through a cached function.
_TABLES: dict[tuple[str, float, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
_VALUES: dict[torch.device, torch.Tensor] = {}
#: Rows that torch's product of whole numbers gets at least, on cards.
FEWEST_ROWS = 32


def check_product(scheme: Scheme, device: torch.device) -> None:
    """``ValueError`` for a product that the device does not have."""
    if scheme.product == "native":
        kernels.check_native(device)
    if scheme.product not in CODED or device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise ValueError(f"quant.product={scheme.product}: not on {device.type}, choose fast, exact or native")
    check = block_codes.check_capability if scheme.product == "fp4" else check_capability
    check(scheme, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def emulates(scheme: Scheme, device: torch.device) -> bool:
    """Whether the device has no FP8 or FP4 units, and multiplies the codes' values in BF16."""
    return scheme.product in ("fp8", "fp4") and device.type == "cpu"


def check_capability(scheme: Scheme, found: tuple[int, int], card: str) -> None:
    needed = SINCE_MX if scheme.format.block else SINCE
    if scheme.product == "fp8" and found < needed:
        raise ValueError(
            f"quant.product=fp8 with {scheme.format.name} needs compute capability {needed[0]}.{needed[1]}, and {card} "
            f"has {found[0]}.{found[1]}: choose quant.product=fast"
        )


def check_shape(scheme: Scheme, linear: nn.Linear, name: str) -> None:
    """``ValueError`` for a linear that the units of a card do not take."""
    of = {"fp8": 16, "int8": 8, "fp4": block_codes.MULTIPLE}.get(scheme.product, 1)
    if linear.weight.is_cuda and (linear.in_features % of or linear.out_features % of):
        raise ValueError(f"quant.product={scheme.product}: {name} has no multiples of {of} as features")


@dataclass(frozen=True)
class Codes:
    """Of an input: uint8 [rows, in]; its scales, float32 [rows] or [], which the weight's multiply as they are: both
    lifts are taken out of these; int64 [], how many fell beyond the format's range (None: none could); int64 [2], how
    many of its values the codes do not hold, of how many."""

    values: torch.Tensor
    scale: torch.Tensor
    over: torch.Tensor | None
    lost: torch.Tensor


def encode_input(scheme: Scheme, rows: torch.Tensor, scale: torch.Tensor | None, factors: torch.Tensor | None) -> Codes:
    """Of a matrix [rows, in], by a static ``scale`` or its own."""
    (of_weights, lift), rule = scheme.lifts, scheme.act_rule
    by_row = scale is None and isinstance(scheme.act_granularity, PerRow) and type(rule) in (AmaxTo, PowerOfTwo)
    kind = KINDS.get(scheme.format.name)
    if by_row and kind is not None:
        assert isinstance(rule, AmaxTo)
        how = (rule.target, rule.power_of_two, lift, of_weights * lift)
        codes, scale, lost = kernels.quantize_rows_coded(rows, kind, *how, factors)
        return Codes(codes, scale, None, lost)
    values, scale, over = scheme.quantize_input(rows, scale, factors)
    if scheme.product == "fp8":
        codes, lost = kernels.carry_e4m3(values, lift)
        # E4M3 ends at 448, long before HiF8 does.
        return Codes(codes, scale / (of_weights * lift), (values.abs() > LARGEST_E4M3 / lift).sum(), lost)
    # A whole number cannot say that it is none: its row's scale does.
    broken = values.isnan()
    codes = values.masked_fill(broken, 0).to(torch.int8).view(torch.uint8)
    none = eager.counted(torch.zeros((), dtype=torch.int64, device=values.device), values.numel())
    return Codes(codes, torch.where(broken.any(1), torch.nan, scale), over, none)


@torch.no_grad()
def encode_weight(scheme: Scheme, codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] that the units multiply, of the format's codes: those themselves, or of E4M3."""
    return codes if _multiplies_its_own(scheme) else kernels.look_up(codes, _carried(scheme, codes.device)[0])


def lost_in_weight(scheme: Scheme, codes: torch.Tensor) -> int:
    """How many values of the format's codes are others in what ``encode_weight`` makes of them."""
    if _multiplies_its_own(scheme):
        return 0
    return int(kernels.look_up(codes, _carried(scheme, codes.device)[1]).sum(dtype=torch.int64))


def _multiplies_its_own(scheme: Scheme) -> bool:
    return scheme.product == "int8" or scheme.format.name in ("e4m3", "mxfp8")


def _carried(scheme: Scheme, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [256], by code of a weight: that of E4M3 which carries its value, and 1 where that is another value."""
    key = (scheme.format.name, scheme.lifts[0], device)
    if key in _TABLES:
        return _TABLES[key]
    values = scheme.format.decode(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    codes, _ = kernels.carry_e4m3(values, scheme.lifts[0])
    held = codes.view(torch.float8_e4m3fn).float() == values.float() * scheme.lifts[0]
    made: tuple[torch.Tensor, torch.Tensor] = _kept(
        _TABLES, key, (codes.to(device), (values.isfinite() & ~held).to(torch.uint8).to(device))
    )
    return made


def _as_bf16(device: torch.device) -> torch.Tensor:
    """BF16 [256]: the value of each code of E4M3."""
    if device in _VALUES:
        return _VALUES[device]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    made: torch.Tensor = _kept(_VALUES, device, codes.view(torch.float8_e4m3fn).to(torch.bfloat16).to(device))
    return made


def _kept(tables: dict[Any, Any], key: Any, made: Any) -> Any:
    """``made``, for the next time too, unless it has no numbers (under ``FakeTensorMode``)."""
    if not isinstance(made[0], FakeTensor):
        tables[key] = made
    return made


def multiply(
    scheme: Scheme,
    x: Codes,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[rows, out] of codes [rows, in] and [out, in]; ``weight_scale`` is that of the format's values."""
    if scheme.product == "int8":
        return kernels.descale(_whole_product(x.values, weight), x.scale, weight_scale, bias, dtype)
    if x.values.is_cuda:
        return _on_card(x, weight, weight_scale, bias).to(dtype)
    operands = (kernels.look_up(codes, _as_bf16(codes.device)) for codes in (x.values, weight))
    return kernels.descale(F.linear(*operands), x.scale, weight_scale, bias, dtype)


def _on_card(x: Codes, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The card's product of E4M3, its scales applied to float32 and rounded once to BF16."""
    rows, columns = len(x.values), len(weight)
    return torch._scaled_mm(
        x.values.view(torch.float8_e4m3fn),
        weight.view(torch.float8_e4m3fn).T,
        scale_a=x.scale.expand(rows)[:, None].contiguous(),
        scale_b=weight_scale.expand(columns)[None, :].contiguous(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _whole_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 [rows, out]."""
    rows, x = len(x), x.view(torch.int8)
    if x.is_cuda and rows < FEWEST_ROWS:
        x = F.pad(x, (0, 0, 0, FEWEST_ROWS - rows))
    return torch._int_mm(x, weight.view(torch.int8).T)[:rows]
