"""Quantized checkpoints: diffusers layout, packed weights, written whole or not at all.

In ``transformer/`` each quantized linear is ``<name>.weight`` (uint8 codes), ``<name>.weight_scale`` (float32),
``<name>.input_scale`` (float32, static schemes only; ``<name>.input_bounds`` are the timesteps between several),
``<name>.input_factor`` (float32, where smoothing could not be folded), ``<name>.input_signs`` (float32, where a
rotation could not), ``<name>.low_rank_down`` and ``low_rank_up`` (BF16) and ``<name>.bias``; every other tensor is
BF16, but for those the model keeps in float32. ``config.json`` carries a ``quantization_config`` that says how to read
them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import wanquant
from wanquant.plugins import load_plugins
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.config import DEFAULT, ActivationConfig, WeightConfig
from wanquant.quant.convert import empty_like_quantized_
from wanquant.quant.scheme import Scheme, scheme_of
from wanquant.registered import METHOD
from wanquant.runs.files import whole_folder, write_atomic
from wanquant.wan.checkpoints.sums import check_finite, seal
from wanquant.wan.families import block_names, block_of, family_of

T = TypeVar("T")

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
#: Keys of a ``quantization_config`` that the first checkpoints do not have, and what those were made with.
ADDED_LATER: dict[str, Any] = {"attention": "off", "smoothing": None, "rotation": None, "low_rank": 0}
#: Endings of the tensors of a quantized linear that stay float32, and of those in BF16.
FLOAT32 = (".weight_scale", ".input_scale", ".input_factor", ".input_signs", ".input_bounds")
LOW_RANK = (".low_rank_down", ".low_rank_up")
#: The type of each.
TYPES = {
    ".weight": torch.uint8,
    **dict.fromkeys(FLOAT32, torch.float32),
    **dict.fromkeys(LOW_RANK, torch.bfloat16),
}
_BESIDE = re.compile(f"({'|'.join(map(re.escape, (*FLOAT32, *LOW_RANK)))})$")
#: The components of a pipeline that may be quantized.
TRANSFORMERS = ("transformer", "transformer_2")


def quantized_linears(transformer: nn.Module) -> dict[str, QuantLinear]:
    return {name: child for name, child in transformer.named_modules() if isinstance(child, QuantLinear)}


def save_quantized(pipe: DiffusionPipeline, folder: str | Path, on_linear: Callable[[], None] = lambda: None) -> Path:
    """Writes the whole pipeline, its quantized transformer packed. Returns the folder.

    Written under a temporary name and renamed at the end; ``FileExistsError`` if the folder is there, ``ValueError``
    if nothing in the pipeline is quantized.
    What of the transformer is neither quantized nor kept in float32 by the model is stored in BF16, whatever it
    is in memory; the other components are stored as they are.
    A source in several files is written to as many, each tensor where it was. ``on_linear`` is called
    after each quantized linear is packed, for progress.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another folder, or remove it")
    found = [part for name, part in pipe.components.items() if name in TRANSFORMERS and part is not None]
    if not any(quantized_linears(part) for part in found):
        raise ValueError("nothing in this pipeline is quantized: save it with its own save_pretrained")
    for part in found:
        refuse_unsaved(part)
    try:
        with whole_folder(folder) as temporary:
            _save_components(pipe, temporary, on_linear)
            seal(temporary)
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    return folder


def _save_components(pipe: DiffusionPipeline, folder: Path, on_linear: Callable[[], None]) -> None:
    pipe.save_config(folder)
    source = Path(str(pipe.config.get("_name_or_path")))
    if (source / "generation.json").is_file():
        # The shift is the scheduler's, which may have been asked for another one than the source's.
        config = pipe.scheduler.config
        shift = None if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift"))
        settings = {**read_json(source / "generation.json"), "flow_shift": shift}
        (folder / "generation.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, component in pipe.components.items():
        if component is None:
            continue
        component = getattr(component, "_orig_mod", component)  # of a compiled one
        if name in TRANSFORMERS and quantized_linears(component):
            save_transformer(component, source / name, folder / name, on_linear)
        else:
            component.save_pretrained(folder / name)
    # safetensors gives its files to their owner alone; they are no more secret than the configs beside them.
    mode = (folder / "model_index.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def save_transformer(
    transformer: WanTransformer3DModel, source: Path, folder: Path, on_linear: Callable[[], None]
) -> None:
    """To its own folder; ``source`` is that of the model it was made of."""
    tensors = stored_tensors(transformer, transformer, on_linear=on_linear)
    folder.mkdir(exist_ok=True)
    _write_shards(tensors, source / INDEX, folder)
    layers = quantized_linears(transformer)
    write_config(transformer, next(iter(layers.values())).scheme, list(layers), folder)


def stored_tensors(
    module: nn.Module, transformer: nn.Module, prefix: str = "", on_linear: Callable[[], None] = lambda: None
) -> dict[str, torch.Tensor]:
    """What of a module goes into a file, by its name in the ``transformer``, where it lies below ``prefix``."""
    layers, tensors = quantized_linears(module), {}
    for name, tensor in module.state_dict().items():
        path, _, part = name.rpartition(".")
        if path in layers and part == "weight":
            tensors[prefix + name] = layers[path].codes()
            on_linear()
        elif kept_in_fp32(transformer, prefix + name) or (path in layers and name.endswith(FLOAT32)):
            tensors[prefix + name] = tensor
        else:
            tensors[prefix + name] = tensor.to(torch.bfloat16)
    return tensors


def write_config(transformer: WanTransformer3DModel, scheme: Scheme, modules: Sequence[str], folder: Path) -> None:
    """``config.json``, with how to read the quantized linears, which are the ``modules``."""
    transformer.save_config(folder)
    written = read_json(folder / "config.json") | {"quantization_config": describe(transformer, scheme, modules)}
    write_json(folder / "config.json", written)


def describe(transformer: Any, scheme: Scheme, modules: Sequence[str]) -> dict[str, Any]:
    """Its ``quantization_config``."""
    touched = {block_of(name, transformer) for name in modules}
    return {
        "quant_method": METHOD,
        "version": wanquant.__version__,
        **dataclasses.asdict(scheme.config),
        "protected_blocks": [index for index in range(len(block_names(transformer))) if index not in touched],
        "modules": list(modules),
    }


def refuse_unsaved(transformer: nn.Module) -> None:
    """``ValueError`` for a quantized transformer with parts that no checkpoint has."""
    if not quantized_linears(transformer):
        return
    if any(hasattr(child, "base_layer") for child in transformer.modules()):
        raise ValueError("a LoRA is loaded on the quantized model: unload_lora_weights() before saving; its file stays")
    if any(getattr(child, "fused_projections", False) for child in transformer.modules()):
        raise ValueError("a quantized model with fused projections cannot be saved: quantize it without fusing them")


def _write_shards(tensors: dict[str, torch.Tensor], source_index: Path, folder: Path) -> None:
    """One file, or those of the source's index: each tensor where it was, a scale beside its weight."""
    shards: dict[str, dict[str, torch.Tensor]] = {}
    before = read_json(source_index)["weight_map"] if source_index.is_file() else {}
    first = min(before.values(), default=WEIGHTS)
    for name, tensor in tensors.items():
        place = before.get(re.sub(_BESIDE, ".weight", name), first)
        shards.setdefault(place, {})[name] = tensor.contiguous()
    for place, shard in shards.items():
        save_file(shard, folder / place, metadata={"format": "pt"})
    if before:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_index(folder, total, {name: place for place, shard in shards.items() for name in shard})


def write_index(folder: Path, total_size: int, weight_map: Mapping[str, str]) -> None:
    """Of a transformer in several files: ``total_size`` bytes of tensors, and the file of each."""
    write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def weight_files(folder: Path) -> list[str]:
    """The names of a transformer's files: those of its index, or its only one. ``ValueError`` if it has several and
    no index."""
    index = folder / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        return sorted(set(shards.values()))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) > 1 and WEIGHTS not in found:
        raise ValueError(f"{folder} has {len(found)} .safetensors files and no {INDEX}: give the path of one of them")
    return found if len(found) == 1 else [WEIGHTS]


def kept_in_fp32(transformer: nn.Module, name: str) -> bool:
    """As diffusers does it: a kept name is one of the parts of the tensor's dotted name."""
    return any(kept in name.split(".") for kept in getattr(transformer, "_keep_in_fp32_modules", None) or ())


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a transformer folder, if it is one of ours; ``ValueError`` if it is damaged."""
    described = read_json(folder / "config.json").get("quantization_config")
    if described is None:
        return None
    if not isinstance(described, dict) or "quant_method" not in described:
        raise ValueError(f"{folder / 'config.json'}: its quantization_config is damaged")
    return described if described["quant_method"] == METHOD else None


def config_of(described: dict[str, Any]) -> QuantConfig:
    """The ``QuantConfig`` a checkpoint was made with; ``ValueError`` names what is lost, for nothing is guessed."""
    load_plugins()
    names = {field.name for field in dataclasses.fields(QuantConfig)}
    raw = {name: value for name, value in {**ADDED_LATER, **described}.items() if name in names}
    raw["weights"] = _exactly(WeightConfig, {"feedback": False, **raw.get("weights", {})})
    raw["activations"] = _exactly(ActivationConfig, {"format": DEFAULT, "steps": 1, **raw.get("activations", {})})
    return _exactly(QuantConfig, raw)


def _exactly(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass from values for all of its fields and for no others."""
    odd = {field.name for field in dataclasses.fields(kind)} ^ set(values)  # type: ignore[arg-type]
    if odd:
        raise ValueError(f"its quantization_config has lost, or this version does not know, {min(odd)}")
    return kind(**values)


def load_transformer(
    folder: Path, described: dict[str, Any], packed: bool | None = None, product: str | None = None
) -> WanTransformer3DModel:
    """A quantized transformer from its folder, exactly as it was saved, in the form the run used or the one given."""
    asked: dict[str, Any] = {"packed": packed, "product": product}
    asked = {name: value for name, value in asked.items() if value is not None}
    scheme = scheme_of(dataclasses.replace(config_of(described), **asked))
    settings = WanTransformer3DModel.load_config(folder)
    with init_empty_weights():
        transformer = family_of(settings.get("_class_name")).transformer.from_config(settings)
    tensors: dict[str, torch.Tensor] = {}
    for name in weight_files(folder):
        tensors |= load_file(folder / name)
    empty_like_quantized_(transformer, described["modules"], scheme, tensors)
    check_keys(transformer.state_dict(), tensors, folder)
    check_finite(tensors, folder)
    for name, layer in quantized_linears(transformer).items():
        for part in (name + ending for ending in TYPES if name + ending in tensors):
            check_part(layer, part, tensors[part], folder)
    if not scheme.coded:
        for name in described["modules"]:
            tensors[f"{name}.weight"] = scheme.format.decode(tensors[f"{name}.weight"])
    transformer.load_state_dict(tensors, strict=True, assign=True)
    transformer.requires_grad_(False)
    return transformer.eval()


def check_part(layer: QuantLinear, name: str, tensor: torch.Tensor, where: Path | str) -> None:
    """``ValueError`` for a layer's tensor that was cast on the way, as a general-purpose loader or converter may do, or
    that is of another size."""
    part = name.rpartition(".")[2]
    wanted = TYPES[f".{part}"]
    if tensor.dtype != wanted:
        raise ValueError(f"{where}: tensor {name} is {tensor.dtype}, not {wanted}: something has cast this checkpoint")
    codes = (layer.out_features, layer.scheme.format.row_bytes(layer.in_features))
    shape = codes if part == "weight" else tuple(layer.get_buffer(part).shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{where}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")


def check_keys(wanted: Collection[str], found: Collection[str], where: Path, strange: Collection[str] = ()) -> None:
    """``ValueError`` names the first tensor that is missing and the first that is unknown, as the ``strange`` are."""
    problems = (("is missing", set(wanted) - set(found)), ("is unknown", {*found, *strange} - set(wanted)))
    told = [f"tensor {min(names)} {problem} ({len(names)} in all)" for problem, names in problems if names]
    if told:
        raise ValueError(f"{where}: {'; '.join(told)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``ValueError`` names the file that is missing, damaged, or holds something else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
