"""Where a model's files are: a pipeline in diffusers' layout, or a transformer in any and the rest from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanquant.runs.files import sums_of
from wanquant.wan.checkpoints.checkpoint import TRANSFORMERS, read_json
from wanquant.wan.checkpoints.sums import model_files, refuse_changed, refuse_missing
from wanquant.wan.checkpoints.tensor_files import SUFFIXES, Source

#: Folders of the two transformers of Wan2.2, as its authors call them.
EXPERTS = ("high_noise_model", "low_noise_model")


@dataclass(frozen=True)
class ModelFiles:
    """``folder`` is a pipeline in diffusers' layout; its ``transformers``, by their names there, may lie elsewhere. A
    transformer without a pipeline has an empty name, and its own path for the ``folder``."""

    folder: Path
    transformers: Mapping[str, Source] = field(hash=False)

    @classmethod
    def of(cls, where: Path | ModelFiles) -> ModelFiles:
        """Of a folder in diffusers' layout, a pipeline's or a transformer's own."""
        if isinstance(where, ModelFiles):
            return where
        if (where / "model_index.json").is_file():
            parts = {name: Source(where / name) for name in TRANSFORMERS if (where / name).is_dir()}
            return cls(where, parts)
        return cls(where, {"": Source(where)})

    @property
    def is_pipeline(self) -> bool:
        return "" not in self.transformers

    @property
    def assembled(self) -> bool:
        """Whether its transformers are not those of its folder."""
        return self.is_pipeline and any(part.path != self.folder / name for name, part in self.transformers.items())

    @property
    def told(self) -> dict[str, Any]:
        """What is worth knowing of transformers in another layout than diffusers', by their names; empty without."""
        return {name or "transformer": part.told for name, part in self.transformers.items() if part.told}

    def __str__(self) -> str:
        paths = [part.path for part in self.transformers.values()] if self.assembled else [self.folder]
        return " and ".join(map(str, paths))

    def content(self) -> dict[str, Path]:
        """The files that make it what it is, by names that do not depend on where they lie. How to ask it for a video
        (``generation.json``) does not count."""
        if self.folder.is_file():
            return {self.folder.suffix: self.folder}
        found = {str(path.relative_to(self.folder)): path for path in model_files(self.folder)}
        if not self.assembled:
            return dict(sorted(found.items()))
        found = {name: path for name, path in found.items() if Path(name).parts[0] not in TRANSFORMERS}
        for name, part in self.transformers.items():
            found |= {f"{name}/{number}": path for number, path in enumerate(part.files)}
        return dict(sorted(found.items()))


def fingerprint(
    model: Path | ModelFiles,
    on_file: Callable[[], None] = lambda: None,
    loras: Sequence[Mapping[str, Any]] = (),
    verify: bool = True,
) -> str:
    """SHA-256 over the model's files, by name and content, so that other weights are another model; and over the
    content and scales of its LoRA files, the transformers they are for, and whether they are fused. ``ValueError``
    names a file that is not what its ``SHA256SUMS`` says, unless ``verify`` is false: it costs nothing more here."""
    files, digest = ModelFiles.of(model), hashlib.sha256()
    if verify and not files.assembled:
        refuse_missing(files.folder)
    content = files.content()
    sums = sums_of(content.values(), on_file)
    if verify:
        refuse_changed(files.folder, sums)
    for name, path in content.items():
        digest.update(name.encode())
        digest.update(bytes.fromhex(sums[path]))
    for part in files.transformers.values() if files.assembled else ():
        digest.update(json.dumps(part.config, sort_keys=True).encode())
    for lora in loras:
        digest.update(f"{lora['sha256']} {lora['scale']} {lora['transformer']} {lora['fused']}".encode())
    return digest.hexdigest()


def count_files(model: Path | ModelFiles) -> int:
    """How often ``fingerprint`` calls back."""
    return len(ModelFiles.of(model).content())


def lone_transformers(path: Path) -> dict[str, Source]:
    """The transformer in a file, or in a folder that is no pipeline, or both of Wan2.2 in one; nothing where there is
    none. ``ValueError`` for a file of another kind, or one that is not there."""
    if path.suffix in SUFFIXES and not path.exists():
        raise ValueError(f"there is no file {path}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: only {' and '.join(SUFFIXES)} files are read, or folders")
        return {"transformer": Source(path)}
    if not path.is_dir() or (path / "model_index.json").is_file():
        return {}
    if all((path / name).is_dir() for name in EXPERTS):
        return {name: Source(path / theirs) for name, theirs in zip(TRANSFORMERS, EXPERTS, strict=True)}
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return {"transformer": Source(path)}
    return {}


def assembled(path: Path, parts: Mapping[str, Source], rest: Path) -> ModelFiles:
    """A pipeline of these transformers and of what else is in ``rest``; ``ValueError`` unless they fit."""
    index = read_json(rest / "model_index.json")
    own = [name for name in TRANSFORMERS if (index.get(name) or [None])[0] is not None]
    if own != list(parts):
        raise ValueError(f"model.base={rest} has {len(own)} transformers, and {path} is {len(parts)}")
    parts = {name: Source(part.path, rest / name / "config.json") for name, part in parts.items()}
    for name, part in parts.items():
        for component, key, ours in (("text_encoder", "d_model", "text_dim"), ("vae", "z_dim", "out_channels")):
            theirs = read_json(rest / component / "config.json").get(key)
            if theirs is not None and part.config.get(ours, theirs) != theirs:
                raise ValueError(
                    f"model.base={rest} is no base of {path}: its {component} has {key}={theirs}, and the {name} "
                    f"{ours}={part.config[ours]}"
                )
    return ModelFiles(rest, parts)
