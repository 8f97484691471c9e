"""The quantized linear: W8A8 as hardware computes it.

    y = s_x · s_w · (Q(x / s_x) · Q(w / s_w)ᵀ) + b

Q rounds to a format whose values are exact in BF16, so a BF16 product of them with float32
accumulation has exact products, provided the scales are applied after it. ``product=fast`` takes
that product in BF16, whose output is rounded once more; ``product=exact`` takes it in float32;
``product=fp8``, ``int8`` and ``fp4`` multiply codes (``wanquant.quant.eight_bit``, ``block_codes``).

Where a block of a row has a scale of its own (NVFP4, MX, HiF4), element times scale is the operand, and exact in BF16:
only the scale outside of it comes after the product.

Differs from the usual fake quantization (dequantize both operands, then multiply) in that no scale
touches an operand: what is simulated is what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

from wanquant.kernels import make_tables, native_product, times
from wanquant.quant import block_codes
from wanquant.quant.config import CODED, EIGHT_BIT
from wanquant.quant.eight_bit import (
    Codes,
    check_product,
    check_shape,
    encode_input,
    encode_weight,
    lost_in_weight,
    multiply,
)
from wanquant.quant.feedback import changed_hessian, quantize_with_feedback
from wanquant.quant.held import HeldLinear
from wanquant.quant.last_input import LastInput
from wanquant.quant.product import Scaled, take_product
from wanquant.quant.rotate import Rotation, rotate, rotation_of
from wanquant.quant.scheme import Rounded, Scheme
from wanquant.quant.site import Site
from wanquant.quant.smooth import Smoothing
from wanquant.quant.source import source_of
from wanquant.quant.steps import largest_by_bin, scale_now


class QuantLinear(HeldLinear):
    """Takes the place of an ``nn.Linear``; a subclass of it, so that peft and diffusers recognise it.

    For inference: no gradient passes through the rounding.
    """

    #: Shared by all, so that ``to_q``, ``to_k`` and ``to_v`` round what they all get once.
    _last = LastInput()

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        seen: float | Site | None = None,
        smoothing: Smoothing | None = None,
        rotation: Rotation | None = None,
        hessian: torch.Tensor | None = None,
    ) -> QuantLinear:
        """Quantizes the weights.

        ``seen`` is the input's largest magnitude or all that calibration recorded of it; static schemes and some
        rules need it. ``smoothing`` says by what its channels are divided, and whether they have been already,
        ``rotation`` whether they come rotated; without one, and where the scheme has it, they are here.
        ``hessian``, float32 [in, in], is for error feedback, of the input before all of that.
        """
        scheme.format.row_bytes(linear.in_features)  # refuses what does not divide
        if rotation is None and scheme.rotation is not None:
            rotation = Rotation(scheme.rotation)
        source = source_of(linear, scheme.low_rank, smoothing, rotation)
        rounded = scheme.quantize_weight(source.weight, seen, source.divisors)
        if scheme.feedback:
            changed = changed_hessian(hessian, source.divisors, rotation)
            rounded = quantize_with_feedback(scheme, source.weight, rounded[1], changed)
        if scheme.act_static and source.divisors is not None:
            assert isinstance(seen, Site), "smoothing needs what each channel did"
            seen = float((torch.from_numpy(seen.view().channel_absmax) / source.divisors.cpu()).amax())
        scale = scheme.input_scale(seen, rounded[0].device)
        if scheme.act_steps > 1:
            assert isinstance(seen, Site), "scales by denoising step need what passed in each"
            source.beside["input_bounds"] = largest_by_bin(seen, scheme.act_steps)[1].to(rounded[0].device)
        return cls.assembled(scheme, rounded, source.bias, scale, source.beside).train(linear.training)

    @classmethod
    def assembled(
        cls,
        scheme: Scheme,
        weight: Rounded,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> QuantLinear:
        """Of a weight [out, in] as ``Scheme.quantize_weight`` gives it, and the buffers ``beside`` it."""
        rounded, weight_scale, over = weight
        beside = beside or {}
        self = cls(rounded.shape[1], rounded.shape[0], bias is not None, scheme, beside)
        self.weight = nn.Parameter(scheme.format.pack(rounded) if scheme.coded else rounded, False)
        self.weight_scale = weight_scale
        self.overflowed = torch.zeros((), dtype=torch.int64, device=rounded.device)
        self.overflowed_weight = torch.zeros_like(self.overflowed) if over is None else over
        self.lost = torch.zeros(2, dtype=torch.int64, device=rounded.device)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
        self.input_scale = input_scale
        for name, tensor in beside.items():
            setattr(self, name, tensor)
        return self.prepare_()

    def quantize_input(self, rows: torch.Tensor) -> Scaled:
        """A matrix [tokens, in] to BF16 values on the grid and their scale, [tokens] or []."""
        operand, scale, over = self.scheme.quantize_input(self._turned(rows), self._scale, self._factor)
        self.overflowed = _plus(self.overflowed, over)
        return operand, scale

    @property
    def _scale(self) -> torch.Tensor | None:
        """Of static inputs, in this denoising step."""
        if self.input_scale is None or self.input_bounds is None:
            return self.input_scale
        return scale_now(self.input_scale, self.input_bounds, self.timestep)

    @property
    def _factor(self) -> torch.Tensor | None:
        """By which channels are multiplied as they are rounded; where they are rotated first, they have been."""
        return None if self.input_signs is not None else self.input_factor

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        if self.input_signs is None:
            return rows
        by = rotation_of(self.input_signs) if self._rotation is None else self._rotation
        return rotate(rows if self.input_factor is None else times(rows, self.input_factor), by)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # It would take the exact product in 16 bits, and cast scales.
            with torch.autocast(x.device.type, enabled=False):
                return self._with_branch(x, self._multiply(x))
        return self._with_branch(x, self._multiply(x))

    def _with_branch(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.low_rank_down is None or self.low_rank_up is None:
            return y
        inner = F.linear(x.to(torch.bfloat16), self.low_rank_down)
        return y + F.linear(inner, self.low_rank_up).to(y.dtype)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.scheme.product in CODED and not x.numel():  # cards have no product of nothing
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.scheme.product in EIGHT_BIT and not self.scheme.format.block:
            return self._multiply_codes(x, rows).view(*x.shape[:-1], self.out_features)
        if self.scheme.product in ("fp4", "fp8") and x.is_cuda:
            return self._multiply_blocks(x, rows).view(*x.shape[:-1], self.out_features)
        scheme, how = self.scheme, (self._scale, self._factor)
        operand, scale, over = self._shared(x, lambda: scheme.quantize_input(self._turned(rows), *how))
        self.overflowed = _plus(self.overflowed, over)
        if self.scheme.product == "native":
            y = native_product(operand, self.codes(), scale, self.weight_scale, self.bias, x.dtype)
        else:
            values = self.scheme.format.decode(self.weight) if self.is_packed else self.weight
            y = take_product((operand, scale), (values, self.weight_scale), self.bias, self.scheme, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _shared(self, x: torch.Tensor, round_: Callable[[], Any]) -> Any:
        """What is made of the input, once for all layers that make the same of it. Not in what is compiled or captured,
        which runs again where this does not."""
        own = self.input_scale is not None or self.input_factor is not None
        if own or torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return round_()
        return self._last.rounded(x, round_, of=(self.scheme, self.input_signs is None), by=self)

    def _multiply_codes(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        codes: Codes = self._shared(x, lambda: encode_input(self.scheme, self._turned(rows), self._scale, self._factor))
        self.overflowed = _plus(self.overflowed, codes.over)
        self.lost = _plus(self.lost, codes.lost)
        return multiply(self.scheme, codes, self._coded_weight(), self.weight_scale, self.bias, x.dtype)

    def _multiply_blocks(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        bits, how = self.scheme.format.bits, (self._scale, self._factor)
        codes: block_codes.BlockCodes = self._shared(
            x, lambda: block_codes.encode_input(self.scheme, self._turned(rows), *how)
        )
        self.overflowed = _plus(self.overflowed, codes.over)
        weight = block_codes.of_packed(self.codes(), self.in_features, self.weight_scale, bits)
        return block_codes.multiply(codes, weight, self.bias, bits).to(x.dtype)

    def _coded_weight(self) -> torch.Tensor:
        """The weight as a product of codes takes it, uint8 [out, in]; made once, and of a packed one in every
        forward."""
        if torch.compiler.is_compiling():
            return encode_weight(self.scheme, self.codes()) if self._coded is None else self._coded[1]
        passing = self.scheme.packed or not self.keeps_codes
        if passing or isinstance(self.weight, FakeTensor) or self.weight.is_inference():
            return encode_weight(self.scheme, self.codes())
        made_of = self.weight._version, self.weight.data_ptr(), self.scheme.lifts
        if self._coded is not None and self._coded[0] == made_of:
            return self._coded[1]
        made = encode_weight(self.scheme, self.codes())
        if not isinstance(made, FakeTensor) and made.data_ptr() != self.weight.data_ptr():
            self._coded = made_of, made
        return made

    def prepare_(self) -> QuantLinear:
        """Makes now what the first pass would make; ``ValueError`` for a product that the device does not have."""
        make_tables(self.weight.device, self.scheme.overflow)
        self._prepare_rotation()
        if self.scheme.product in CODED and not self.weight.is_meta:
            check_product(self.scheme, self.weight.device)
            check_shape(self.scheme, self, "a linear")
        if self.scheme.product in EIGHT_BIT and not self.weight.is_meta:
            self._coded_weight()
        return self

    def lost_weights(self) -> int:
        """How many values of the weight a product of codes does not hold."""
        return lost_in_weight(self.scheme, self.codes()) if self.scheme.product in EIGHT_BIT else 0


def _plus(count: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
    """In place, on the device where it is counted."""
    return count if more is None else (count if count.device == more.device else count.to(more.device)).add_(more)
