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

from wanquant.quant.config import CODED
from wanquant.quant.eight_bit import check_product
from wanquant.wan.checkpoints.checkpoint import (
    TRANSFORMERS,
    check_keys,
    load_transformer,
    quantized_linears,
    read_json,
)
from wanquant.wan.checkpoints.find import DAMAGE, IMAGE_ENCODER, check_folder, find_model, first_line
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.checkpoints.quantizer import attach
from wanquant.wan.checkpoints.sums import check_finite, check_sums
from wanquant.wan.checkpoints.tensor_files import Source
from wanquant.wan.device import pick_device
from wanquant.wan.families import family_of, family_of_pipe
from wanquant.wan.resources.placement import HOST, Placement

#: The classes, for rooms that do not import diffusers.
Pipeline = WanPipeline
Transformer = WanTransformer3DModel
#: Transformer, VAE, text encoder, and the rest with the move to the device.
LOAD_PARTS = 4


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
    or file of another layout (``docs/models.md``), with the rest of its pipeline from ``base``.

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
        family.prepare(parts["vae"])
        on_part()
        for name, kind in family.text_encoders.items():
            parts[name] = _whole(kind, folder / name, torch.bfloat16)
        if (folder / IMAGE_ENCODER).is_dir():
            parts[IMAGE_ENCODER] = _whole(family.image_encoder, folder / IMAGE_ENCODER, torch.float32)
        on_part()
        pipe = family.pipeline.from_pretrained(folder, **parts, local_files_only=True)
    except DAMAGE as error:
        told = first_line(error)
        named = any(told.startswith(str(path)) for path in (folder, *(p.path for p in files.transformers.values())))
        raise ValueError(told if named else f"cannot load a Wan pipeline from {files}: {told}") from error
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, placement)
    on_part()
    return pipe


def _place(pipe: WanPipeline, placement: Placement) -> None:
    transformers = [part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None]
    if placement.streams:
        for name in family_of_pipe(pipe).text_encoders:
            placement.encoder_(getattr(pipe, name))
        for part in (pipe.vae, getattr(pipe, IMAGE_ENCODER, None)):
            if part is not None:
                part.to(placement.device)
    else:
        pipe.to(placement.device)
    for layer in [layer for part in transformers for layer in quantized_linears(part).values()]:
        if not placement.streams:
            layer.prepare_()
        elif layer.scheme.product in CODED:  # the host need not have it
            check_product(layer.scheme, placement.device)


def hush_libraries() -> None:
    """Turns off the progress bars of loading and saving, for programs that show their own progress."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


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
