"""A loaded pipeline that makes each thing once: prompts' embeddings and final latents are kept in the cache, by
signature, for all runs. Latents are what a video is kept as, being fifty times smaller.

Latents are kept batch by batch, so a run that was killed goes on at the batch it was killed in, and more seeds or
prompts cost only the new batches. What a batch holds is part of its signature: its videos round by each other.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wanquant.quant.config import EIGHT_BIT
from wanquant.runs import launch
from wanquant.runs.cache import Cache
from wanquant.runs.progress import progress
from wanquant.runs.signature import GENERATES, signature
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import ModelConfig, Picture
from wanquant.wan.experts import put, whole_of
from wanquant.wan.families import Text
from wanquant.wan.generate import Sample, decode_video, embed_prompt, generate, one_ulp_up
from wanquant.wan.load import Pipeline

Pair = tuple[str, int]
#: What of generation changes no latent.
NOT_COUNTED = ("fps",)
#: Writes to a folder what is kept of a batch; calls back after each denoising step.
MakeBatch = Callable[[list[Pair], Callable[[], None], Path], None]
LATENTS, COUNTS, TEXT = "latents.safetensors", "counts.json", "text.safetensors"


@dataclass
class CachedPipeline:
    pipe: Pipeline
    model: ModelConfig
    fingerprint: str
    device: torch.device
    cache: Cache
    #: First frames by prompt, of a model that takes them.
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    #: What was not made by this run but found in the cache.
    reused: list[str] = field(default_factory=list)
    _noted: set[str] = field(default_factory=set)
    _embedded: dict[str, Text] = field(default_factory=dict)

    @property
    def transformer(self) -> Any:
        """The pipeline's, or both of Wan2.2 as one. What is put in its place goes into the pipeline."""
        return whole_of(self.pipe)

    @transformer.setter
    def transformer(self, whole: Any) -> None:
        put(self.pipe, whole)

    def signature(self, kind: str, **counted: Any) -> str:
        generation = {k: v for k, v in dataclasses.asdict(self.model.generation).items() if k not in NOT_COUNTED}
        common = {"artefact": kind, "generation": generation, "outliers": dataclasses.asdict(self.model.outliers)}
        if self.pictures:
            shown = {prompt for key in ("pairs", "calib") for prompt, _ in counted.get(key, ())}
            common["pictures"] = {prompt: self.pictures[prompt].sha256 for prompt in sorted(shown)}
        return signature({**common, **counted}, self.fingerprint, self.device, GENERATES)

    def artefact(self, label: str, kind: str, signature: str, make: Callable[[Path], None]) -> Path:
        """From the cache, which is said, or made now."""
        folder = self.cache.folder(kind, signature, make)
        self.note(label, known=folder not in self.cache.made)
        return folder

    def note(self, label: str, known: bool) -> None:
        """Once for each label: what comes from the cache, be it that another process has just made it."""
        if known and label not in self._noted:
            self.reused.append(label)
            print(f"{label:<20} known, from {self.cache.root}", file=sys.stderr, flush=True)
        self._noted.add(label)

    def embed(self, prompt: str) -> Text:
        """On the CPU."""
        if prompt not in self._embedded:

            def make(folder: Path) -> None:
                embedded = embed_prompt(self.pipe, prompt, self.model.generation)
                save_file({name: tensor.contiguous().cpu() for name, tensor in embedded.items()}, folder / TEXT)

            counted = {"artefact": "text", "prompt": prompt, "length": self.model.generation.max_text_length}
            folder = self.cache.folder("text", signature(counted, self.fingerprint, self.device, GENERATES), make)
            self._embedded[prompt] = load_file(folder / TEXT)
        return self._embedded[prompt]

    def embedding(self, prompt: str) -> torch.Tensor:
        """[text length, width] of Wan's one text encoder."""
        return self.embed(prompt)["prompt_embeds"]

    def generate(self, pairs: Sequence[Pair], on_step: Callable[[], None], **how: Any) -> list[Sample]:
        """In the model's batches, whatever the transformer is at the moment; kept nowhere."""
        how = {"batch": self.model.batch, "embed": self.embed, "pictures": self.pictures, **how}
        return generate(self.pipe, pairs, self.model.generation, on_step, **how)

    @contextmanager
    def progress(self, label: str, pairs: Sequence[Pair], times: int = 1) -> Iterator[Callable[[], None]]:
        """Over the denoising steps of the pairs' batches, so many times; of none nothing is shown."""
        if not pairs:
            yield lambda: None
            return
        with progress(label, times * len(self.grouped(pairs)) * self.model.generation.steps) as tick:
            yield tick

    def latents(
        self, label: str, pairs: list[Pair], how: dict[str, Any] | None = None, afresh: bool = False
    ) -> tuple[list[torch.Tensor], Counter[str]]:
        """Final latents of every pair, float32 [channels, frames', h, w], and what quantized linears counted
        (``counted``); ``how`` and ``afresh`` as in ``batches``."""
        latents: list[torch.Tensor] = []
        counts: Counter[str] = Counter()
        for group, folder in self.batches(label, pairs, how, afresh):
            found = load_file(folder / LATENTS)
            latents += [found[str(number)] for number in range(len(group))]
            counts.update(json.loads((folder / COUNTS).read_text()))
        return latents, counts

    def batches(
        self,
        label: str,
        pairs: list[Pair],
        how: dict[str, Any] | None = None,
        afresh: bool = False,
        only: Collection[Pair] | None = None,
    ) -> list[tuple[list[Pair], Path]]:
        """The batches of these pairs, each with the folder of the cache that holds its latents; all, or those in which
        a pair of ``only`` is.

        ``how`` says what the transformer is, or what is done to the noise (``{"perturbed": "1 ulp"}``), where that is
        not plain BF16: all that the caller has done to it. ``afresh`` makes them again.
        """
        how = how or {}
        groups = [group for group in self.grouped(pairs) if only is None or set(group) & set(only)]
        signatures = [self.signature("latents", pairs=group, **how) for group in groups]
        if afresh and groups:
            launch.once(f"afresh {signatures[0]}", partial(self.cache.forget, "latents", *signatures))
        perturb = one_ulp_up if how.get("perturbed") == "1 ulp" else None
        folders = self.folders("latents", label, groups, partial(self._make_latents, perturb), **how)
        self.note(label, known=not self.cache.made.intersection(folders))
        return list(zip(groups, folders, strict=True))

    def grouped(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """In the model's batches."""
        batch = self.model.batch
        return [list(pairs[first : first + batch]) for first in range(0, len(pairs), batch)]

    def folders(self, kind: str, label: str, groups: Sequence[list[Pair]], make: MakeBatch, **how: Any) -> list[Path]:
        """The folder of the cache for each batch, made now where it is missing: first what no other process is at, then
        what they have made."""
        signatures = [self.signature(kind, pairs=group, **how) for group in groups]
        known = [self.cache.has(kind, each) for each in signatures]
        missing = [pair for group, there in zip(groups, known, strict=True) for pair in group if not there]
        with self.progress(label, missing) as tick:
            makers = [partial(make, group, tick) for group in groups]
            for each, maker, there in zip(signatures, makers, known, strict=True):
                if not there:
                    self.cache.offer(kind, each, maker)
            return [self.cache.folder(kind, each, maker) for each, maker in zip(signatures, makers, strict=True)]

    def _make_latents(self, perturb: Any, group: list[Pair], tick: Callable[[], None], folder: Path) -> None:
        before = self.counted()
        samples = self.generate(group, tick, perturb=perturb, decode=False)
        _write_latents(samples, {name: count - before[name] for name, count in self.counted().items()}, folder)

    def counted(self) -> dict[str, int]:
        """Of each quantized linear so far, ``overflow NAME``: elements that fell beyond the format's range; where it
        multiplies codes, ``lost NAME``: values of its inputs that these do not hold, of ``coded NAME``."""
        found = {}
        for name, layer in quantized_linears(self.transformer).items():
            found[f"overflow {name}"] = int(layer.overflowed)
            if layer.scheme.product in EIGHT_BIT:
                found[f"lost {name}"], found[f"coded {name}"] = layer.lost.tolist()
        return found

    def keep(self, group: list[Pair], samples: Sequence[Sample]) -> None:
        """The latents of a batch that the BF16 model made on another occasion, so that it need not make them again."""
        signed = self.signature("latents", pairs=group)
        self.cache.folder("latents", signed, lambda folder: _write_latents(samples, {}, folder))

    def videos(self, label: str, pairs: list[Pair], latents: list[torch.Tensor]) -> list[Sample]:
        """Decoded, by the first process of a launch: the others have no use for them."""
        if not launch.first():
            return [Sample(*pair, final, np.empty(0)) for pair, final in zip(pairs, latents, strict=True)]
        with progress(f"decode ({label})", len(pairs), "video") as tick:
            samples = []
            for pair, final in zip(pairs, latents, strict=True):
                samples.append(Sample(*pair, final, decode_video(self.pipe, final)))
                tick()
        return samples


def _write_latents(samples: Sequence[Sample], counts: Mapping[str, int], folder: Path) -> None:
    save_file({str(i): sample.latents for i, sample in enumerate(samples)}, folder / LATENTS)
    (folder / COUNTS).write_text(json.dumps({name: count for name, count in counts.items() if count}))


def load_latents(folder: Path, place: int) -> torch.Tensor:
    """Of one video of a batch."""
    with safe_open(folder / LATENTS, "pt") as file:
        found: torch.Tensor = file.get_tensor(str(place))
    return found
