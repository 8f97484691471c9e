"""The quantized linear: W8A8 as hardware computes it.

    y = s_x · s_w · (Q(x / s_x) · Q(w / s_w)ᵀ) + b

Q rounds to a format whose values are exact in BF16, so a BF16 product of them with float32
accumulation has exact products, provided the scales are applied after it. ``product=fast`` takes
that product in BF16, whose output is rounded once more; ``product=exact`` takes it in float32;
``product=fp8`` and ``int8`` multiply codes (``wanquant.quant.eight_bit``).

Where a block of a row has a scale of its own (NVFP4, MX, HiF4), element times scale is the operand, and exact in BF16:
only the scale outside of it comes after the product.

Differs from the usual fake quantization (dequantize both operands, then multiply) in that no scale
touches an operand: what is simulated is what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from wanquant.kernels import make_tables, native_product
from wanquant.quant.eight_bit import (
    Codes,
    check_product,
    check_shape,
    encode_input,
    encode_weight,
    lost_in_weight,
    multiply,
    multiply_mx,
)
from wanquant.quant.last_input import LastInput
from wanquant.quant.product import Scaled, take_product
from wanquant.quant.scheme import EIGHT_BIT, Rounded, Scheme
from wanquant.quant.site import Site
from wanquant.quant.smooth import Smoothing


class QuantLinear(nn.Linear):
    """Takes the place of an ``nn.Linear``; a subclass of it, so that peft and diffusers recognise it.

    For inference: no gradient passes through the rounding.

    weight        BF16 [out, in]: values on the format's grid; or uint8 [out, bytes of a row]: their codes (packed)
    weight_scale  float32 [out], or [] per tensor
    input_scale   float32 [], with static activations only
    input_factor  float32 [in], powers of two by which channels are multiplied before rounding; where smoothing is
    bias          BF16
    overflowed    int64 []: elements, of the weight and of all inputs so far, that fell beyond the format's range
    lost          int64 [2]: of all inputs so far, values that a product of codes does not hold, and all of them
    """

    #: Shared by all, so that ``to_q``, ``to_k`` and ``to_v`` round what they all get once.
    _last = LastInput()

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    input_factor: torch.Tensor | None
    overflowed: torch.Tensor
    lost: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, factored: bool = False) -> None:
        """An empty layer of the right shapes, on meta; ``from_linear`` or a checkpoint fills it."""
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=torch.bfloat16)
        self.scheme = scheme
        stored = (scheme.format.row_bytes(in_features), torch.uint8) if scheme.coded else (in_features, torch.bfloat16)
        self.weight = nn.Parameter(torch.empty(out_features, stored[0], dtype=stored[1], device="meta"), False)
        shape = scheme.weight_granularity.scale_shape(out_features)
        self.register_buffer("weight_scale", torch.empty(shape, device="meta"))
        self.register_buffer("input_scale", torch.empty((), device="meta") if scheme.act_static else None)
        self.register_buffer("input_factor", torch.empty(in_features, device="meta") if factored else None)
        # No buffers: offloading puts those back as they were before the pass.
        self.overflowed = torch.zeros((), dtype=torch.int64, device="cpu")
        self.lost = torch.zeros(2, dtype=torch.int64, device="cpu")
        #: What tells the weight it was made of, and its codes as a product takes them.
        self._coded: tuple[Any, torch.Tensor] | None = None
        #: Not where weights are brought to a device for each pass, on which the codes of all would stay.
        self.keeps_codes = True

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, scheme: Scheme, seen: float | Site | None = None, smoothing: Smoothing | None = None
    ) -> QuantLinear:
        """Quantizes the weights, from BF16: a source in float32 is cast first, so both give the same.

        ``seen`` is the input's largest magnitude or all that calibration recorded of it; static schemes and some
        rules need it. ``smoothing`` says by what its channels are divided, and whether they have been already.
        """
        scheme.format.row_bytes(linear.in_features)  # refuses what does not divide
        source, divisors, factor = linear.weight.detach().to(torch.bfloat16), None, None
        if smoothing is not None:
            divisors = smoothing.divisors.to(source.device)
            if not smoothing.folded:
                source, factor = source * divisors.to(torch.bfloat16), 1 / divisors
        rounded = scheme.quantize_weight(source, seen, divisors)
        if scheme.act_static and divisors is not None:
            assert isinstance(seen, Site), "smoothing needs what each channel did"
            seen = float((torch.from_numpy(seen.view().channel_absmax) / divisors.cpu()).amax())
        self = cls.assembled(scheme, rounded, linear.bias, scheme.input_scale(seen, source.device), factor)
        return self.train(linear.training)

    @classmethod
    def assembled(
        cls,
        scheme: Scheme,
        weight: Rounded,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        input_factor: torch.Tensor | None = None,
    ) -> QuantLinear:
        """Of a weight [out, in] as ``Scheme.quantize_weight`` gives it."""
        rounded, weight_scale, overflowed = weight
        self = cls(rounded.shape[1], rounded.shape[0], bias is not None, scheme, input_factor is not None)
        self.weight = nn.Parameter(scheme.format.pack(rounded) if scheme.coded else rounded, False)
        self.weight_scale = weight_scale
        self.overflowed = torch.zeros_like(weight_scale, dtype=torch.int64).sum() if overflowed is None else overflowed
        self.lost = torch.zeros(2, dtype=torch.int64, device=rounded.device)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
        self.input_scale, self.input_factor = input_scale, input_factor
        return self.prepare_()

    @property
    def is_packed(self) -> bool:
        return self.weight.dtype == torch.uint8

    def codes(self) -> torch.Tensor:
        """The weights as uint8 codes [out, bytes of a row], packed or not; exact."""
        return self.weight.data if self.is_packed else self.scheme.format.pack(self.weight.data)

    def pack_(self) -> QuantLinear:
        """Keeps the weights as codes, half the memory; they are decoded in every forward."""
        self.weight = nn.Parameter(self.codes(), requires_grad=False)
        return self

    def unpack_(self) -> QuantLinear:
        """Keeps the weights as BF16 values. Nothing is lost either way."""
        if self.is_packed:
            self.weight = nn.Parameter(self.scheme.format.decode(self.weight.data), requires_grad=False)
        return self

    def dequantized(self) -> nn.Linear:
        """A plain linear of what the codes mean, in BF16: rounded once more unless the scales are powers of two."""
        values = self.scheme.format.decode(self.codes(), torch.float32)
        values = values * (self.weight_scale[:, None] if self.weight_scale.ndim else self.weight_scale)
        if self.input_factor is not None:
            values = values * self.input_factor  # by whose inverse the weights were multiplied
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, values.device, torch.bfloat16)
        linear.weight = nn.Parameter(values.to(torch.bfloat16), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def quantize_input(self, rows: torch.Tensor) -> Scaled:
        """A matrix [tokens, in] to BF16 values on the grid and their scale, [tokens] or []."""
        operand, scale, over = self.scheme.quantize_input(rows, self.input_scale, self.input_factor)
        self.overflowed = _plus(self.overflowed, over)
        return operand, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # It would take the exact product in 16 bits, and cast scales.
            with torch.autocast(x.device.type, enabled=False):
                return self._multiply(x)
        return self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.scheme.product in EIGHT_BIT and not x.numel():  # cards have no product of nothing
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.scheme.product in EIGHT_BIT and not self.scheme.format.block:
            return self._multiply_codes(x, rows).view(*x.shape[:-1], self.out_features)
        scheme, how = self.scheme, (self.input_scale, self.input_factor)
        operand, scale, over = self._shared(x, lambda: scheme.quantize_input(rows, *how))
        self.overflowed = _plus(self.overflowed, over)
        if self.scheme.product == "native":
            y = native_product(operand, self.codes(), scale, self.weight_scale, self.bias, x.dtype)
        elif self.scheme.product == "fp8" and operand.is_cuda:
            y = multiply_mx(self.scheme.format.pack(operand), self.codes(), self.in_features, self.bias).to(x.dtype)
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
        return self._last.rounded(x, round_, of=self.scheme, by=self)

    def _multiply_codes(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        codes: Codes = self._shared(x, lambda: encode_input(self.scheme, rows, self.input_scale, self.input_factor))
        self.overflowed = _plus(self.overflowed, codes.over)
        self.lost = _plus(self.lost, codes.lost)
        return multiply(self.scheme, codes, self._coded_weight(), self.weight_scale, self.bias, x.dtype)

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
        if self.scheme.product in EIGHT_BIT and not self.weight.is_meta:
            check_product(self.scheme, self.weight.device)
            check_shape(self.scheme, self, "a linear")
            self._coded_weight()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Packed weights into unpacked ones and the other way; ``ValueError`` for those of a plain linear."""
        name, format_, self._coded = f"{prefix}weight", self.scheme.format, None
        if name in state_dict and f"{name}_scale" not in state_dict:
            raise ValueError(f"{name} comes without its scale: load it into the plain model, then quantize_")
        weight = state_dict.get(name, self.weight)
        if (weight.dtype == torch.uint8) != self.is_packed:
            made = format_.pack(weight) if self.is_packed else format_.decode(weight)
            state_dict = {**state_dict, name: made}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def lost_weights(self) -> int:
        """How many values of the weight a product of codes does not hold."""
        return lost_in_weight(self.scheme, self.codes()) if self.scheme.product in EIGHT_BIT else 0

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Moves like any module, but a change of type leaves scales in float32, weight and bias what they are."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        before, self._coded = {name: parameter.data for name, parameter in self.named_parameters()}, None
        super()._apply(fn, recurse)
        for name, parameter in list(self.named_parameters()):
            if parameter.dtype != before[name].dtype:
                setattr(self, name, nn.Parameter(before[name].to(parameter.device), requires_grad=False))
        if not self.weight.is_meta:
            self.overflowed, self.lost = (count.to(self.weight.device) for count in (self.overflowed, self.lost))
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved if moved.dtype == torch.float32 else buffer.to(moved.device)
        make_tables(self.weight.device, self.scheme.overflow)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.scheme.format.name}, packed={self.is_packed}"


def _plus(count: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
    """In place, on the device where it is counted."""
    return count if more is None else (count if count.device == more.device else count.to(more.device)).add_(more)
