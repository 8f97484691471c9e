"""What to quantize to, as a config holds it: strings, which ``wanquant.quant.scheme`` parses; and how to train that."""

from __future__ import annotations

from dataclasses import dataclass, field

from wanquant.choices import check_choices, choice

PRODUCTS = ("fast", "exact", "native", "fp8", "int8", "fp4")
#: Products of 8-bit codes, and all those of codes, which weights are kept as.
EIGHT_BIT = ("fp8", "int8")
CODED = (*EIGHT_BIT, "fp4")
#: The formats whose values such a product multiplies; no others, whose values need not be E4M3's.
MULTIPLIED = {"fp8": ("hif8", "e4m3", "e5m2", "mxfp8"), "int8": ("int8",), "fp4": ("nvfp4", "mxfp4")}
ATTENTION = ("off", "qkv", "qkvp")
#: Of the gradients in the backward pass of training, and of static inputs meanwhile.
GRADIENTS = ("none", "hif8", "stochastic")
SCALINGS = ("current", "delayed")
#: The format's own choice. ``Scheme.config`` names what it was.
DEFAULT = "default"
OVERFLOWS = (DEFAULT, "inf", "saturate")


@dataclass
class WeightConfig:
    granularity: str = DEFAULT
    rule: str = DEFAULT
    #: GPTQ (arXiv 2210.17323): columns are rounded one by one, and what one loses is made up for in the next.
    feedback: bool = False


@dataclass
class ActivationConfig:
    granularity: str = DEFAULT
    rule: str = DEFAULT
    #: A static scale comes from calibration and needs ``granularity=per_tensor``.
    static: bool = False
    #: Into how many bins the denoising steps go, each with a static scale of its own; 1: one scale for all.
    steps: int = 1
    #: ``default``: that of the weights. ``bf16`` leaves activations as they are (W4A16).
    format: str = DEFAULT


@dataclass
class QuantConfig:
    """The default is ``quant=hif8_w8a8``; see ``wanquant.quant.scheme`` for what the strings mean."""

    name: str = "hif8_w8a8"
    format: str = "hif8"
    weights: WeightConfig = field(default_factory=WeightConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    #: ``inf`` or ``saturate``: what a magnitude beyond the format's range becomes.
    overflow: str = choice(DEFAULT, OVERFLOWS)
    #: ``fast``: a BF16 product, scaled in float32; ``exact``: a float32 product, the reference; ``native``: the
    #: chip's own product of codes, where it has one; ``fp8``, ``int8``: of 8-bit codes (``wanquant.quant.eight_bit``);
    #: ``fp4``: of four-bit codes (``wanquant.quant.block_codes``).
    product: str = choice("fast", PRODUCTS)
    #: ``qkv``: attention takes Q, K and V in the format; ``qkvp``: and multiplies V by probabilities in it.
    attention: str = choice("off", ATTENTION)
    #: Keep weights as uint8 codes and decode them in every forward.
    packed: bool = False
    #: SmoothQuant (arXiv 2211.10438): how much of the activations' spread over channels goes into the weights, 0 to
    #: 1 (its paper takes 0.5); null for none. Its divisors are powers of two here.
    smoothing: float | None = None
    #: Channels in a block of the Hadamard rotation of inputs (QuaRot, arXiv 2404.00456), a power of two; null for none.
    rotation: int | None = None
    #: Rank of the BF16 branch beside the quantized weight (SVDQuant, arXiv 2411.05007); 0 for none.
    low_rank: int = 0


@dataclass(frozen=True)
class Training:
    """How a quantized linear is trained.

    weights        whether the weight and bias are trained; if not, they stay BF16 and have no gradient
    clip_mask      whether what falls beyond the range has no gradient
    learn_scales   the weight's scales are trained too, and the input's where it is static
    gradients      ``none``: BF16; ``hif8``: rounded to nearest; ``stochastic``: to either neighbour
    scaling        of static inputs: ``current``, as calibrated; ``delayed``, by the last ``window`` steps
    """

    weights: bool = True
    clip_mask: bool = True
    learn_scales: bool = False
    gradients: str = choice("none", GRADIENTS)
    scaling: str = choice("current", SCALINGS)
    window: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        if self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1")
        if self.learn_scales and self.scaling == "delayed":
            raise ValueError("scaling=delayed takes scales from what passes, so they cannot be learned")
