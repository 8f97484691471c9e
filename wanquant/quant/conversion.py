"""What a quantization makes of each linear and each attention: planned, and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from wanquant.formats.base import Format
from wanquant.formats.registry import FORMATS
from wanquant.quant.attention import check_processor
from wanquant.quant.config import QuantConfig
from wanquant.quant.linear import QuantLinear
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.quant.select import match_names, resolve_blocks

#: By a linear that projections of an attention were fused into, these.
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v"), "to_added_kv": ("add_k_proj", "add_v_proj")}


@dataclass(frozen=True)
class ModuleReport:
    """What became of one linear or attention: ``converted``, ``protected`` or ``skipped``, and why."""

    name: str
    status: str
    reason: str
    block: int | None


@dataclass(frozen=True)
class ConversionReport:
    """Every linear of the module, in the order of ``named_modules``; every attention, if that is asked for too."""

    modules: tuple[ModuleReport, ...]
    blocks: int
    protected_blocks: tuple[int, ...]
    attentions: tuple[ModuleReport, ...] = ()

    def names(self, status: str) -> list[str]:
        return [module.name for module in self.modules if module.status == status]

    def converted_attentions(self) -> list[str]:
        return [attention.name for attention in self.attentions if attention.status == "converted"]

    def counts(self) -> dict[str, int]:
        return _count(self.modules)

    def attention_counts(self) -> dict[str, int]:
        return _count(self.attentions)


def _count(rows: Sequence[ModuleReport]) -> dict[str, int]:
    counted = Counter(row.status for row in rows)
    return {status: counted[status] for status in ("converted", "protected", "skipped")}


def plan_conversion(
    module: nn.Module,
    config: QuantConfig | Scheme | None = None,
    protected_blocks: Sequence[int] = (),
    protected_modules: Sequence[str] = (),
    blocks: str = "blocks",
) -> ConversionReport:
    """What ``quantize_`` would do, without doing it, and with its refusals; works on meta tensors."""
    scheme, block_list = scheme_of(config), _block_list(module, blocks)
    protected = resolve_blocks(protected_blocks, len(block_list))
    inside = {
        f"{blocks}.{index}.{name}".rstrip("."): (index, name)
        for index, block in enumerate(block_list)
        for name, child in block.named_modules()
        if isinstance(child, nn.Linear)
    }
    _refuse_hidden(module)
    widths = {child.in_features for block in block_list for child in block.modules() if type(child) is nn.Linear}
    kept, fused = match_names(protected_modules, (name for _, name in inside.values())), _fused(module)
    rows = []
    for name, child in module.named_modules():
        if isinstance(child, QuantLinear):
            raise ValueError(f"{name} is quantized already: load the original model to quantize it in another way")
        if not isinstance(child, nn.Linear):
            continue
        index, name_inside = inside.get(name, (None, ""))
        if index is None:
            found = "skipped", f"outside {blocks}"
        elif name in fused:
            found = "skipped", f"not in use: fused into {fused[name]}"
        elif type(child) is not nn.Linear:
            # A subclass may use its weight otherwise than nn.Linear does, as attention's out_proj.
            found = "skipped", f"a {type(child).__name__}, not a plain linear"
        elif index in protected:
            found = "protected", f"block {index}"
        elif name_inside in kept:
            found = "protected", "module pattern"
        else:
            found = _fate(name, child, index, scheme, widths)
        rows.append(ModuleReport(name, *found, index))
    return ConversionReport(tuple(rows), len(block_list), protected, _plan_attention(module, rows, scheme))


def _block_list(module: nn.Module, blocks: str) -> nn.ModuleList | nn.Sequential:
    try:
        block_list = module.get_submodule(blocks)
    except AttributeError:
        raise ValueError(f"{type(module).__name__} has no list of blocks named {blocks!r}") from None
    if not isinstance(block_list, nn.ModuleList | nn.Sequential) or len(block_list) == 0:
        raise ValueError(f"{blocks!r} of {type(module).__name__} is not a list of blocks")
    return block_list


def _fate(name: str, linear: nn.Linear, block: int, scheme: Scheme, widths: Collection[int]) -> tuple[str, str]:
    """Status and reason of a linear that no selector protects; ``widths`` are those of all in the blocks."""
    if scheme.format.keeps_all:
        return "skipped", f"{scheme.format.name} is no quantization"
    for format_ in (scheme.format, scheme.act_format):
        try:
            format_.row_bytes(linear.in_features)
        except ValueError as error:
            other = f"{error}, {_instead(format_, widths)}"
            raise ValueError(f"{name} cannot be quantized to {format_.name}: {other}") from None
    if scheme.rotation is not None and linear.in_features % scheme.rotation:
        wide = f"{linear.in_features} channels do not divide into blocks of {scheme.rotation}"
        raise ValueError(f"{name} cannot be rotated: {wide}")
    if scheme.low_rank > min(linear.weight.shape):
        raise ValueError(f"quant.low_rank={scheme.low_rank}: {name} has no more than {min(linear.weight.shape)}")
    return "converted", f"block {block}"


def _instead(format_: Format, widths: Collection[int]) -> str:
    fit = [other.name for other in FORMATS.values() if other.bits == format_.bits and other.block]
    fit = [name for name in fit if not any(columns % FORMATS[name].block for columns in widths)]
    return f"choose {' or '.join(fit)}" if fit else "protect it (protect.modules) or choose a format without blocks"


def _fused(module: nn.Module) -> dict[str, str]:
    """The linears that are not in use, and what each was fused into."""
    split = ((*name.rpartition("."), name) for name, _ in module.named_modules())
    return {f"{owner}.{part}": name for owner, _, last, name in split for part in FUSED.get(last, ())}


def _refuse_hidden(module: nn.Module) -> None:
    """Linears that are shared, or whose output is not their own."""
    if hasattr(module, "_orig_mod"):
        raise ValueError("this is a compiled module: quantize the module it was made of, then compile")
    names: dict[int, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if hasattr(child, "base_layer"):
            how = "fuse_lora() and unload_lora_weights() first, or load the LoRA after quantize_"
            raise ValueError(f"{name} has an adapter: {how}")
        if isinstance(child, nn.Linear) and names.setdefault(id(child), name) != name:
            raise ValueError(f"{name} is the same linear as {names[id(child)]}: shared linears cannot be quantized")


def attentions(names: Collection[str]) -> list[str]:
    """The modules whose ``to_q``, ``to_k`` and ``to_v`` are all among the names: their attention is quantized."""
    owners = [name.removesuffix(".to_q") for name in names if name.endswith(".to_q")]
    return [owner for owner in owners if {f"{owner}.to_k", f"{owner}.to_v"} <= set(names)]


def _plan_attention(module: nn.Module, linears: Sequence[ModuleReport], scheme: Scheme) -> tuple[ModuleReport, ...]:
    """Every attention with the fate of its projections; of one that is not quantized, what kept the first of them."""
    if scheme.attention == "off":
        return ()
    known, rows = {row.name: row for row in linears}, []
    for owner in attentions(known):
        three = [known[f"{owner}.{part}"] for part in ("to_q", "to_k", "to_v")]
        decisive = next((row for row in three if row.status != "converted"), three[0])
        rows.append(replace(decisive, name=owner))
        if decisive.status == "converted":
            check_processor(getattr(module.get_submodule(owner), "processor", None))
    if all(row.status != "converted" for row in rows):
        raise ValueError(f"quant.attention={scheme.attention}: no attention has its to_q, to_k and to_v quantized")
    return tuple(rows)
