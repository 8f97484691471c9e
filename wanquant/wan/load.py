"""Loads a Wan pipeline: tiny-wan, a hub repository, or a folder, quantized or not.

The transformer comes in BF16 with the model's own list of float32 modules kept, the VAE in float32:
that is the BF16 reference of every comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from wanquant.quant.eight_bit import check_product
from wanquant.quant.scheme import EIGHT_BIT
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import (
    TRANSFORMERS,
    check_keys,
    load_transformer,
    quantized_linears,
    read_json,
)
from wanquant.wan.checkpoints.model_files import ModelFiles, assembled, lone_transformers
from wanquant.wan.checkpoints.quantizer import attach
from wanquant.wan.checkpoints.sums import check_finite, check_sums
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.device import pick_device
from wanquant.wan.families import FAMILIES, Family, family_of
from wanquant.wan.resources.placement import HOST, Placement

#: The classes, for rooms that do not import diffusers.
Pipeline = WanPipeline
Transformer = WanTransformer3DModel
#: Transformer, VAE, text encoder, and the rest with the move to the device.
LOAD_PARTS = 4
#: The folder of the encoder of pictures, which some image-to-video models have.
IMAGE_ENCODER = "image_encoder"
#: Of models on the hub, by their ids: what says how large they are.
SHAPES = Path(__file__).with_name("shapes")
#: What libraries raise over a damaged checkpoint.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_pipeline(
    source: str | Path | ModelFiles,
    device: str = "auto",
    on_part: Callable[[], None] = lambda: None,
    packed: bool | None = None,
    product: str | None = None,
    base: str | Path = "",
    placement: Placement | None = None,
    verify: bool = True,
) -> WanPipeline:
    """The pipeline at ``source``: ``"tiny"``, a folder in diffusers layout, or a hub id; or a transformer in a folder
    or file of another layout (``docs/checkpoints.md``), with the rest of its pipeline from ``base``.

    Files are checked before anything is loaded: ``ValueError`` names what is missing, unknown or truncated.
    Only a hub id may reach for the network, and only if it is not in the local cache. ``on_part`` is called
    ``LOAD_PARTS`` times, for progress.
    A quantized transformer comes as it was made, unless told otherwise: ``packed`` keeps its weights as one byte
    each, which halves its memory and changes no value; ``product`` is for another device than it was made for.
    ``placement`` says where its weights wait, if not on the ``device``.
    A checkpoint with a ``SHA256SUMS`` is held to it unless ``verify`` is false. A NaN or infinite weight is refused.
    """
    placement = placement or Placement(pick_device(device))
    files = source if isinstance(source, ModelFiles) else find_model(source, base)
    family, folder = check_folder(files), files.folder
    if verify and not files.assembled:
        check_sums(folder)
    try:
        parts = _read_transformers(files, packed, product, placement)
        on_part()
        parts["vae"] = _whole(family.vae, folder / "vae", torch.float32)
        on_part()
        parts["text_encoder"] = _whole(family.text_encoder, folder / "text_encoder", torch.bfloat16)
        if (folder / IMAGE_ENCODER).is_dir():
            parts[IMAGE_ENCODER] = _whole(family.image_encoder, folder / IMAGE_ENCODER, torch.float32)
        on_part()
        pipe = family.pipeline.from_pretrained(folder, **parts, local_files_only=True)
    except DAMAGE as error:
        told = _first_line(error)
        named = any(told.startswith(str(path)) for path in (folder, *(p.path for p in files.transformers.values())))
        raise ValueError(told if named else f"cannot load a Wan pipeline from {files}: {told}") from error
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, placement)
    on_part()
    return pipe


def _place(pipe: WanPipeline, placement: Placement) -> None:
    transformers = [part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None]
    if placement.streams:
        placement.encoder_(pipe.text_encoder)
        for part in (pipe.vae, getattr(pipe, IMAGE_ENCODER, None)):
            if part is not None:
                part.to(placement.device)
    else:
        pipe.to(placement.device)
    for layer in [layer for part in transformers for layer in quantized_linears(part).values()]:
        if not placement.streams:
            layer.prepare_()
        elif layer.scheme.product in EIGHT_BIT:  # the host need not have it
            check_product(layer.scheme, placement.device)


def hush_libraries() -> None:
    """Turns off the progress bars of loading and saving, for programs that show their own progress."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def find_model(source: str | Path, base: str | Path = "", shapes_only: bool = False, alone: bool = False) -> ModelFiles:
    """The files of ``source``, with ``base`` for what of a pipeline a transformer has not; as ``find_folder``. A
    transformer ``alone`` needs none."""
    path = Path(source).expanduser()
    parts = {} if str(source) in tiny.SHIPPED else lone_transformers(path)
    if not parts:
        folder = find_folder(source, shapes_only)
        if base:
            raise ValueError(f"{source} is no transformer alone: leave model.base={base} out")
        return ModelFiles.of(folder)
    if base:
        rest = find_folder(base, shapes_only, rest=True)
        check_shape(ModelFiles(rest, parts))
        return assembled(path, parts, rest)
    if not alone or len(parts) > 1:
        raise ValueError(
            f"{source} is a transformer alone: give the rest of its pipeline (text encoder, VAE, tokenizer, "
            f"scheduler) as model.base=<folder in diffusers layout, or hub id>"
        )
    return ModelFiles(path, {"": parts["transformer"]})


def find_folder(source: str | Path, shapes_only: bool = False, rest: bool = False) -> Path:
    """The local folder of ``source``; a hub id is looked up in the cache and fetched only if it is not there.

    ``shapes_only`` is content with the JSON files, which say what the model is without its weights; those of the models
    that have a config here come with the package. ``rest`` is content without the transformers' weights.
    """
    if not str(source):
        raise ValueError("model.path is empty: give a folder in diffusers layout, a hub id, or tiny")
    if str(source) in tiny.SHIPPED:
        return tiny.folder(str(source))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"no model folder {source}: give a folder in diffusers layout, a hub id, or tiny")
    shipped = SHAPES / str(source).replace("/", "--")
    if shapes_only and shipped.is_dir():
        return shipped
    wanted: dict[str, Any] = {"allow_patterns": "*.json"} if shapes_only else {}
    wanted |= {"ignore_patterns": [f"{name}/*.safetensors" for name in TRANSFORMERS]} if rest else {}
    try:
        cached = Path(snapshot_download(str(source), **wanted, local_files_only=True))
        # The cache may hold a part only, such as the JSON files of an earlier look at the shapes.
        (check_shape if shapes_only else check_rest if rest else check_folder)(cached)
        return cached
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache, or not whole: ask the hub
    try:
        return Path(snapshot_download(str(source), **wanted))
    except Exception as error:  # the hub client raises from a dozen libraries
        told = f"cannot get {source} from the hub: {_first_line(error)} (model.path and model.base take folders)"
        raise ValueError(told) from error


def check_shape(model: Path | ModelFiles) -> Family:
    """The family of the pipeline that the JSON files describe; ``ValueError`` unless they are all there and it is a
    known one. Weights are not looked at, nor a transformer that lies elsewhere."""
    files = ModelFiles.of(model)
    folder = files.folder
    if not (folder / "model_index.json").is_file():
        made = folder / "checkpoint" / "model_index.json"
        hint = f" (that of this run is {made.parent})" if made.is_file() else ""
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json{hint}")
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ValueError(f"{folder} is a {kind}, not a {' or a '.join(FAMILIES)}")
    elsewhere = TRANSFORMERS if files.assembled else ()
    listed = (name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None)
    for name in dict.fromkeys((*family.components, *listed)):
        if name not in elsewhere and not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}: the checkpoint is incomplete")
    for path in folder.glob("*/*.json"):
        read_json(path)
    return family


def check_folder(model: Path | ModelFiles) -> Family:
    """As ``check_shape``, of a whole pipeline: ``ValueError`` names the file that is missing or truncated."""
    files = ModelFiles.of(model)
    family = check_shape(files)
    check_rest(files.folder)
    for part in files.transformers.values():
        if part.as_diffusers:
            check_weights(part.path)
        else:
            shape_of(part)
    return family


def check_rest(folder: Path) -> None:
    """As ``check_folder``, of what else than transformers has weights."""
    for name in ("text_encoder", "vae", *(n for n in (IMAGE_ENCODER,) if (folder / n).is_dir())):
        check_weights(folder / name)


def check_weights(folder: Path) -> None:
    """As ``check_folder``, of one component."""
    read_json(folder / "config.json")
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        wanted |= set(shards.values())
    files = wanted or {path.name for path in folder.glob("*.safetensors")}
    if not files:
        raise ValueError(f"{folder} has no .safetensors file: the checkpoint is incomplete")
    for name in sorted(files):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: the checkpoint is incomplete")
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is truncated or damaged: {_first_line(error)}") from None


def transformers_of(folder: Path) -> dict[str, Path]:
    """The folders of a pipeline's transformers, by their names; under an empty name the one whose folder it is."""
    return {name: part.path for name, part in ModelFiles.of(folder).transformers.items()}


def shape_of(where: Path | Source) -> WanTransformer3DModel:
    """The transformer in a folder or file, on the meta device. Where its layout is not diffusers' own, its tensors are
    held against it, by the files' headers: ``ValueError`` names what is missing or unknown."""
    source = Source.of(where)
    try:
        with torch.device("meta"):
            shape = family_of(source.config.get("_class_name")).transformer.from_config(source.config)
        if not source.as_diffusers and source.is_there:
            source.check(shape)
        return shape
    except DAMAGE as error:
        told = _first_line(error).removeprefix(f"{source.path}: ")
        raise ValueError(f"{source.path} is no Wan transformer: {told}") from error


def _read_transformers(
    files: ModelFiles, packed: bool | None, product: str | None, placement: Placement
) -> dict[str, Any]:
    """Of a pipeline. Of two that are one quantized and one protected as a whole, ``packed`` is for the quantized."""
    found = files.transformers
    quantized = [name for name, part in found.items() if part.quantization is not None]
    asked = quantized or found
    return {
        name: read_transformer(part, *((packed, product) if name in asked else (None, None)), placement)
        for name, part in found.items()
    }


def read_transformer(
    where: Path | Source, packed: bool | None = None, product: str | None = None, placement: Placement | None = None
) -> WanTransformer3DModel:
    """Of its own folder or file, as ``load_pipeline`` has it; on the host, unless there is a ``placement``."""
    source, placement = Source.of(where), placement or Placement(HOST)
    if source.quantization is not None:
        # Brought to a device in every pass, codes are half as much.
        packed = True if placement.streams else packed
        transformer = load_transformer(source.path, source.quantization, packed, product)
        attach(transformer, source.quantization)
        return placement.put_(transformer, mapped=True)
    if packed is not None or product is not None:
        raise ValueError("packed and product are for a quantized model, and this one is not")
    if not source.as_diffusers or source.kinds:
        return placement.put_(_assemble(source))
    kind = family_of(read_json(source.path / "config.json").get("_class_name")).transformer
    if placement.way == "disk":
        return placement.put_(placement.read(kind, source.path), mapped=True)
    return placement.put_(_whole(kind, source.path, torch.bfloat16, exactly=True))


def _assemble(source: Source) -> WanTransformer3DModel:
    """What diffusers would load if it had the same tensors in its own layout."""
    with init_empty_weights():
        transformer = family_of(source.config.get("_class_name")).transformer.from_config(source.config)
    source.check(transformer)
    tell_dequantized(source)
    tensors = {name: source.read_for(transformer, name) for name in source.tensors}
    transformer.load_state_dict(tensors, strict=True, assign=True)
    transformer.register_to_config(_name_or_path=str(source.path))
    return transformer.eval()


def tell_dequantized(source: Source) -> None:
    """Says so where weights were quantized by others."""
    if source.dequantized:
        print(source.dequantized, file=sys.stderr, flush=True)


def _whole(kind: Any, folder: Path, dtype: torch.dtype, exactly: bool = False) -> Any:
    """A component, refused if a tensor is missing, or, ``exactly``, unknown: the libraries would fill the one at
    random, leave the other out, and only warn."""
    model, info = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    check_keys(info["missing_keys"], info["unexpected_keys"] if exactly else (), folder)
    check_finite(model.state_dict(), folder)
    return model


def read_generation(folder: Path) -> dict[str, Any]:
    """The ``generation.json`` beside a model: size, frames, steps, guidance scale, flow shift, text length."""
    return read_json(folder / "generation.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
