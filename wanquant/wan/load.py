"""Loads a Wan pipeline: tiny-wan, a hub repository, or a folder, quantized or not.

The transformer comes in BF16 with the model's own list of float32 modules kept, the VAE in float32:
that is the BF16 reference of every comparison.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from wanquant.wan import tiny
from wanquant.wan.checkpoint import TRANSFORMERS, load_transformer, quantization_of
from wanquant.wan.device import pick_device

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")


def load_pipeline(source: str | Path, device: str = "auto") -> WanPipeline:
    """The pipeline at ``source``: ``"tiny"``, a folder in diffusers layout, or a hub id.

    A folder is checked before anything is loaded: ``ValueError`` names what is missing or truncated.
    Only a hub id may reach for the network, and only if it is not in the local cache.
    """
    target = pick_device(device)
    folder = find_folder(source)
    check_folder(folder)
    try:
        loaded = {
            name: _transformer(folder / name) for name in TRANSFORMERS if (folder / name / "config.json").is_file()
        }
        pipe = WanPipeline.from_pretrained(
            folder,
            **loaded,
            dtype={"vae": torch.float32, "default": torch.bfloat16},
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a Wan pipeline from {folder}: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target)


def hush_libraries() -> None:
    """Turns off the progress bars of loading and saving, for programs that show their own progress."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)


def find_folder(source: str | Path) -> Path:
    """The local folder of ``source``; a hub id is looked up in the cache and fetched if it is not there."""
    if str(source) == "tiny":
        return tiny.folder()
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"no model folder {source}: give a folder in diffusers layout, a hub id, or tiny")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:  # the hub client raises from a dozen libraries
        raise ValueError(
            f"cannot get {source} from the hub: {_first_line(error)} (model.path takes a folder)"
        ) from error


def check_folder(folder: Path) -> None:
    """``ValueError`` unless ``folder`` is a whole Wan pipeline: names the file that is missing or truncated."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    try:
        described = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{index} is not JSON: {error}") from None
    if described.get("_class_name") != "WanPipeline":
        raise ValueError(f"{folder} is a {described.get('_class_name')}, not a WanPipeline")
    for name in COMPONENTS:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no folder {name}: the checkpoint is incomplete")
    for name in ("text_encoder", "vae", *(t for t in TRANSFORMERS if (folder / t).is_dir())):
        _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the checkpoint is incomplete")
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        wanted |= set(json.loads(index.read_text())["weight_map"].values())
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


def empty_transformer(folder: Path) -> WanTransformer3DModel:
    """The transformer of a pipeline folder on the meta device: its shape, without reading a weight."""
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "transformer"))


def _transformer(folder: Path) -> WanTransformer3DModel:
    described = quantization_of(folder)
    if described is not None:
        return load_transformer(folder, described)
    return WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the pipeline's files, by name and content, so that other weights are another model."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".model")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_generation(folder: Path) -> dict[str, Any]:
    """The ``generation.json`` beside a model: size, frames, steps, guidance scale, flow shift, text length."""
    path = folder / "generation.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no generation.json")
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
