"""Where a model is found, and whether it is whole: by its JSON files and the headers of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import TRANSFORMERS, read_json
from wanquant.wan.checkpoints.model_files import ModelFiles, assembled, lone_transformers
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.families import FAMILIES, Family, family_of

#: The folder of the encoder of pictures, which some image-to-video models have.
IMAGE_ENCODER = "image_encoder"
#: Of models on the hub, by their ids: what says how large they are.
SHAPES = Path(__file__).parents[1] / "shapes"
#: What libraries raise over a damaged checkpoint.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


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
        told = f"cannot get {source} from the hub: {first_line(error)} (model.path and model.base take folders)"
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
    family, index = _family_in(folder), read_json(folder / "model_index.json")
    elsewhere = TRANSFORMERS if files.assembled else ()
    for part in (part for part in files.transformers.values() if elsewhere and part.as_diffusers):
        kind, wanted = part.config.get("_class_name"), family.transformer.__name__
        if kind not in (None, wanted):
            raise ValueError(f"{part.path} is a {kind}, and the pipeline in {folder} has a {wanted}")
    listed = (name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None)
    for name in dict.fromkeys((*family.components, *listed)):
        if name not in elsewhere and not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}: the checkpoint is incomplete")
    for path in folder.glob("*/*.json"):
        read_json(path)
    return family


def _family_in(folder: Path) -> Family:
    kind = read_json(folder / "model_index.json").get("_class_name")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ValueError(f"{folder} is a {kind}, not a {' or a '.join(FAMILIES)}")
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
    for name in (*_family_in(folder).text_encoders, "vae", *(n for n in (IMAGE_ENCODER,) if (folder / n).is_dir())):
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
            raise ValueError(f"{folder / name} is truncated or damaged: {first_line(error)}") from None


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
        told = first_line(error).removeprefix(f"{source.path}: ")
        raise ValueError(f"{source.path} is no Wan transformer: {told}") from error


def read_generation(folder: Path) -> dict[str, Any]:
    """The ``generation.json`` beside a model: size, frames, steps, guidance scale, flow shift, text length."""
    return read_json(folder / "generation.json")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
