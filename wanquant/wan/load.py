"""Loads a Wan pipeline: tiny-wan, a hub repository, or a folder, quantized or not.

The transformer comes in BF16 with the model's own list of float32 modules kept, the VAE in float32:
that is the BF16 reference of every comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from wanquant.runs.files import sum_of_file
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import (
    TRANSFORMERS,
    load_transformer,
    quantization_of,
    quantized_linears,
    read_json,
)
from wanquant.wan.checkpoints.names import config_to_diffusers
from wanquant.wan.checkpoints.quantizer import attach
from wanquant.wan.device import pick_device
from wanquant.wan.families import FAMILIES, Family, family_of

#: The classes, for rooms that do not import diffusers.
Pipeline = WanPipeline
Transformer = WanTransformer3DModel
#: Transformer, VAE, text encoder, and the rest with the move to the device.
LOAD_PARTS = 4
#: Of models on the hub, by their ids: what says how large they are.
SHAPES = Path(__file__).with_name("shapes")
#: What libraries raise over a damaged checkpoint.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_pipeline(
    source: str | Path,
    device: str = "auto",
    on_part: Callable[[], None] = lambda: None,
    packed: bool | None = None,
    product: str | None = None,
) -> WanPipeline:
    """The pipeline at ``source``: ``"tiny"``, a folder in diffusers layout, or a hub id.

    A folder is checked before anything is loaded: ``ValueError`` names what is missing or truncated.
    Only a hub id may reach for the network, and only if it is not in the local cache. ``on_part`` is called
    ``LOAD_PARTS`` times, for progress.
    A quantized transformer comes as it was made, unless told otherwise: ``packed`` keeps its weights as one byte
    each, which halves its memory and changes no value; ``product`` is for another device than it was made for.
    """
    target = pick_device(device)
    folder = find_folder(source)
    family = check_folder(folder)
    try:
        parts = _read_transformers(folder, packed, product)
        on_part()
        parts["vae"] = _whole(family.vae, folder / "vae", torch.float32)
        on_part()
        parts["text_encoder"] = _whole(family.text_encoder, folder / "text_encoder", torch.bfloat16)
        on_part()
        pipe = family.pipeline.from_pretrained(folder, **parts, local_files_only=True)
    except DAMAGE as error:
        raise ValueError(f"cannot load a Wan pipeline from {folder}: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(target)
    for name in TRANSFORMERS:
        for layer in quantized_linears(parts[name]).values() if parts.get(name) is not None else ():
            layer.prepare_()
    on_part()
    return pipe


def hush_libraries() -> None:
    """Turns off the progress bars of loading and saving, for programs that show their own progress."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def find_folder(source: str | Path, shapes_only: bool = False) -> Path:
    """The local folder of ``source``; a hub id is looked up in the cache and fetched only if it is not there.

    ``shapes_only`` is content with the JSON files, which say what the model is without its weights; those of the models
    that have a config here come with the package.
    """
    if str(source) in tiny.SHIPPED:
        return tiny.folder(str(source))
    shipped = SHAPES / str(source).replace("/", "--")
    if shapes_only and shipped.is_dir() and not Path(source).is_dir():
        return shipped
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"no model folder {source}: give a folder in diffusers layout, a hub id, or tiny")
    wanted = "*.json" if shapes_only else None
    try:
        cached = Path(snapshot_download(str(source), allow_patterns=wanted, local_files_only=True))
        # The cache may hold a part only, such as the JSON files of an earlier look at the shapes.
        (check_shape if shapes_only else check_folder)(cached)
        return cached
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache, or not whole: ask the hub
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # the hub client raises from a dozen libraries
        told = f"cannot get {source} from the hub: {_first_line(error)} (model.path takes a folder)"
        raise ValueError(told) from error


def check_shape(folder: Path) -> Family:
    """The family of the pipeline that the JSON files in ``folder`` describe; ``ValueError`` unless they are all there
    and it is a known one. Weights are not looked at."""
    if not (folder / "model_index.json").is_file():
        made = folder / "checkpoint" / "model_index.json"
        hint = f" (that of this run is {made.parent})" if made.is_file() else ""
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json{hint}")
    kind = read_json(folder / "model_index.json").get("_class_name")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ValueError(f"{folder} is a {kind}, not a {' or a '.join(FAMILIES)}")
    for name in family.components:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}: the checkpoint is incomplete")
    for path in folder.glob("*/*.json"):
        read_json(path)
    return family


def check_folder(folder: Path) -> Family:
    """As ``check_shape``, of a whole pipeline: ``ValueError`` names the file that is missing or truncated."""
    family = check_shape(folder)
    for name in ("text_encoder", "vae", *(t for t in TRANSFORMERS if (folder / t).is_dir())):
        check_weights(folder / name)
    return family


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
    if (folder / "model_index.json").is_file():
        return {name: folder / name for name in TRANSFORMERS if (folder / name).is_dir()}
    return {"": folder}


def shape_of(folder: Path) -> WanTransformer3DModel:
    """The transformer of its own folder, on the meta device; diffusers' ``config.json`` or that of Wan's authors."""
    try:
        described = read_json(folder / "config.json")
        described = config_to_diffusers(described) if described.get("_class_name") == "WanModel" else described
        with torch.device("meta"):
            return family_of(described.get("_class_name")).transformer.from_config(described)
    except DAMAGE as error:
        raise ValueError(f"{folder} is no Wan transformer: {_first_line(error)}") from error


def _read_transformers(folder: Path, packed: bool | None, product: str | None) -> dict[str, Any]:
    """Of a pipeline. Of two that are one quantized and one protected as a whole, ``packed`` is for the quantized."""
    found = transformers_of(folder)
    quantized = [name for name, part in found.items() if quantization_of(part) is not None]
    asked = quantized or found
    return {
        name: read_transformer(part, packed, product) if name in asked else read_transformer(part)
        for name, part in found.items()
    }


def read_transformer(folder: Path, packed: bool | None = None, product: str | None = None) -> WanTransformer3DModel:
    """Of its own folder, as ``load_pipeline`` has it."""
    described = quantization_of(folder)
    if described is not None:
        transformer = load_transformer(folder, described, packed, product)
        attach(transformer, described)
        return transformer
    if packed is not None or product is not None:
        raise ValueError("packed and product are for a quantized model, and this one is not")
    kind = family_of(read_json(folder / "config.json").get("_class_name")).transformer
    return _whole(kind, folder, torch.bfloat16)


def _whole(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A component, refused if a tensor is missing: the libraries would fill it at random and only warn."""
    model, info = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"tensor {missing[0]} of {folder.name} is missing ({len(missing)} in all)")
    return model


def _files(folder: Path) -> list[Path]:
    """What makes a pipeline what it is; how to ask it for a video (``generation.json``) does not."""
    kinds = (".safetensors", ".json", ".model")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in kinds and p.name != "generation.json")


def count_files(folder: Path) -> int:
    """How often ``fingerprint`` calls back."""
    return len(_files(folder))


def fingerprint(folder: Path, on_file: Callable[[], None] = lambda: None) -> str:
    """SHA-256 over the pipeline's files, by name and content, so that other weights are another model."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(bytes.fromhex(sum_of_file(path)))
        on_file()
    return digest.hexdigest()


def read_generation(folder: Path) -> dict[str, Any]:
    """The ``generation.json`` beside a model: size, frames, steps, guidance scale, flow shift, text length."""
    return read_json(folder / "generation.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
