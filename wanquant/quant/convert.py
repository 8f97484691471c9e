"""Quantizes a model in place: ``quantize_`` for inference, ``make_trainable_`` for training; with a report of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from wanquant.quant.attention import QuantAttention
from wanquant.quant.config import QuantConfig, Training
from wanquant.quant.conversion import ConversionReport, attentions, plan_conversion
from wanquant.quant.eight_bit import check_product, check_shape
from wanquant.quant.held import OPTIONAL
from wanquant.quant.last_input import LastInput
from wanquant.quant.linear import QuantLinear
from wanquant.quant.rotate import Rotation, rotations
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.quant.site import Site
from wanquant.quant.smooth import Smoothing, smooth_
from wanquant.quant.steps import follow_timesteps_
from wanquant.quant.trainable import TrainableQuantLinear, check_trainable, trainable_linears
from wanquant.registered import guard

L = TypeVar("L", bound=nn.Module)


def quantize_(
    module: nn.Module,
    config: QuantConfig | Scheme | None = None,
    protected_blocks: Sequence[int] = (),
    protected_modules: Sequence[str] = (),
    stats: Mapping[str, float | Site] | None = None,
    blocks: str = "blocks",
    on_linear: Callable[[], None] = lambda: None,
    folds: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    keep: Callable[[QuantLinear], QuantLinear] = lambda layer: layer,
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> ConversionReport:
    """Quantizes every linear inside the unprotected blocks of ``module``, in place.

    protected_blocks   indices from either end, ``(0, 1, -3, -2, -1)``; those stay bit-identical
    protected_modules  patterns (``re.fullmatch``) of names inside a block: ``ffn.net.2``, ``attn1.*``
    stats              by linear's full name, its largest input magnitude, which static activations need, or all that
                       calibration recorded of the input, which smoothing and some rules need
    blocks             dotted name of the list of blocks
    on_linear          called after each linear, for progress
    folds              for smoothing and rotation: by a linear's name inside a block the name of the linear or norm that
                       alone makes its input, channel by channel, and makes nothing else's
                       (``wanquant.wan.families.FOLDS``)
    device             where linears are quantized one by one, if not where they are; ``keep`` then puts each where it
                       is to stay
    hessians           by linear's full name Σ x xᵀ of its inputs, for error feedback
                       (``wanquant.quant.feedback.HessianObserver``)

    Linears outside the blocks stay as they are, and so do forward hooks of all: what one adds to a linear's output, a
    LoRA's product, it adds to the quantized one's, and nothing is folded there. With ``config.attention``,
    attention itself is quantized where its ``to_q``, ``to_k`` and ``to_v`` are.
    Everything is checked before anything is changed: ``ValueError`` names a wrong index, a pattern that matches
    nothing, a linear that cannot be quantized so.
    """
    scheme, known = scheme_of(config), dict(stats or {})
    plan = plan_conversion(module, scheme, protected_blocks, protected_modules, blocks)
    todo = plan.names("converted")
    _check_weights(module, todo, scheme, device)
    _check_statistics(scheme, todo, known)
    hessians = _checked_hessians(scheme, todo, hessians or {})
    smoothed: dict[str, Smoothing] = {}
    rotated: dict[str, Rotation] = {}
    homes = {row.name: f"{blocks}.{row.block}" for row in plan.modules}
    if scheme.smoothing is not None:
        smoothed = smooth_(module, todo, homes, known, scheme.smoothing, folds or {})
    if scheme.rotation is not None:
        rotated = rotations(module, todo, homes, folds or {}, scheme.rotation)
    for name in todo:
        linear = _there(_linear(module, name), device)
        found = known.get(name), smoothed.get(name), rotated.get(name), hessians.get(name)
        try:
            layer = QuantLinear.from_linear(linear, scheme, *found)
        except ValueError as error:  # of statistics that are not this linear's, or not finite
            raise ValueError(f"{name}: {error}") from None
        module.set_submodule(name, keep(with_hooks_of(linear, layer)))
        on_linear()
    _set_attention(module, plan.converted_attentions(), scheme)
    _follow_timesteps(module, todo, scheme)
    guard(module)
    return plan


def make_trainable_(
    module: nn.Module,
    config: QuantConfig | Scheme | None = None,
    protected_blocks: Sequence[int] = (),
    protected_modules: Sequence[str] = (),
    stats: Mapping[str, float | Site] | None = None,
    how: Training | None = None,
    blocks: str = "blocks",
) -> ConversionReport:
    """As ``quantize_`` with the same arguments, but what it converts is to be trained, in the way ``how`` says. What it
    does not convert is left as it is."""
    scheme, how, known = scheme_of(config), how or Training(), dict(stats or {})
    check_trainable(scheme, how)
    plan = plan_conversion(module, scheme, protected_blocks, protected_modules, blocks)
    todo, last = plan.names("converted"), LastInput()
    _check_statistics(scheme, todo, known)
    for name in todo:
        layer = TrainableQuantLinear(_linear(module, name), scheme, known.get(name), how, last)
        module.set_submodule(name, layer)
    _set_attention(module, plan.converted_attentions(), scheme)
    return plan


def freeze_into_(target: nn.Module, trained: nn.Module) -> None:
    """Makes of ``target``, the model before it was made trainable, what inference runs: its tensors get the trained
    values in their own type, its linears become what was trained in their place."""
    layers = trainable_linears(trained)
    values = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name.rpartition(".")[0] not in layers:
                parameter.copy_(values[name])
    for name, layer in layers.items():
        target.set_submodule(name, layer.frozen())
    guard(target)
    for name, child in trained.named_modules():
        processor = getattr(child, "processor", None)
        if isinstance(processor, QuantAttention):
            _set_attention(target, [name], processor.scheme)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is a {type(linear).__name__}, not a linear")
    return linear


def with_hooks_of(linear: nn.Module, layer: L) -> L:
    """What they add to the one's output they add to the other's."""
    for kind in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(layer, kind, getattr(linear, kind))
    return layer


def folded_names(module: nn.Module, folds: Mapping[str, str]) -> set[str]:
    """The modules of a quantized model that smoothing or rotation is folded into, of their inputs or outputs."""
    found = set[str]()
    for name, layer in module.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        smoothed = layer.scheme.smoothing is not None and layer.input_factor is None
        if smoothed or (layer.scheme.rotation is not None and layer.input_signs is None):
            for reader, writer in folds.items():
                if name.endswith(f".{reader}"):
                    found |= {name, name.removesuffix(reader) + writer}
    return found


def _there(linear: nn.Linear, device: torch.device | None) -> nn.Linear:
    """On the device: itself, or a copy, because others may have the same weights."""
    return linear if device in (None, linear.weight.device) else copy.deepcopy(linear).to(device)


def _set_attention(module: nn.Module, names: Sequence[str], scheme: Scheme) -> None:
    for name in names:
        attention: Any = module.get_submodule(name)
        attention.set_processor(QuantAttention(scheme))


def _check_weights(module: nn.Module, names: Sequence[str], scheme: Scheme, device: torch.device | None) -> None:
    for name in names:
        weight = _linear(module, name).weight
        check_product(scheme, device or weight.device)
        check_shape(scheme, _linear(module, name), name)
        if not scheme.format.codes_all and not weight.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite, for which {scheme.format.name} has no code")


def _check_statistics(scheme: Scheme, names: Sequence[str], stats: Mapping[str, float | Site]) -> None:
    steps = scheme.act_steps

    def is_full(seen: float | Site) -> bool:
        return isinstance(seen, Site) and seen.channel_square.size > 0

    def has_steps(seen: float | Site) -> bool:
        return isinstance(seen, Site) and len(seen.timesteps) >= steps

    demands: list[tuple[bool, str, Callable[[float | Site], bool]]] = [
        (scheme.act_static, "static activations need", lambda _: True),
        (scheme.needs_statistics, "smoothing and this scale rule need full", is_full),
        (steps > 1, f"quant.activations.steps={steps} needs, of as many steps or more,", has_steps),
    ]
    for asked, what, serves in demands:
        missing = [name for name in names if name not in stats or not serves(stats[name])] if asked else []
        if missing:
            raise ValueError(f"{what} calibration statistics of {missing[0]} ({len(missing)} missing)")


def _checked_hessians(
    scheme: Scheme, names: Sequence[str], hessians: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """None where no feedback asks for them."""
    known = set(hessians)  # and not ``in``, which may read them from a file
    missing = [name for name in names if name not in known] if scheme.feedback else []
    if missing:
        raise ValueError(f"error feedback needs the Hessian of the input of {missing[0]} ({len(missing)} missing)")
    return hessians if scheme.feedback else {}


def empty_like_quantized_(
    module: nn.Module, names: Sequence[str], scheme: Scheme, stored: Collection[str] = ()
) -> None:
    """Puts empty ``QuantLinear`` layers (on meta) at ``names``, for a checkpoint to fill, whose tensors are the
    ``stored``."""
    for name in names:
        linear = _linear(module, name)
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        own = [part for part in OPTIONAL if f"{name}.{part}" in stored]
        module.set_submodule(name, QuantLinear(*shape, scheme, own))
    if scheme.attention != "off":
        _set_attention(module, attentions(names), scheme)
    _follow_timesteps(module, names, scheme)


def _follow_timesteps(module: nn.Module, names: Sequence[str], scheme: Scheme) -> None:
    if scheme.act_steps > 1:
        follow_timesteps_(module, [module.get_submodule(name) for name in names])
