"""What a run would need of memory and time, by the model's shapes and a short probe of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from wanquant.quant import ConversionReport, plan_conversion
from wanquant.quant.feedback import feedback_bytes
from wanquant.quant.scheme import Scheme
from wanquant.quant.statistics import Layout
from wanquant.wan.checkpoints.find import IMAGE_ENCODER
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig
from wanquant.wan.experts import parts_of, shape_of_whole
from wanquant.wan.load import Transformer
from wanquant.wan.resources.counts import VideoCounts as VideoCounts
from wanquant.wan.resources.empty import (
    Given,
    Quantized,
    empty_encoder,
    empty_vae,
    parameters_of,
    sizes_of_layers,
    tokens_of,
)
from wanquant.wan.resources.footprint import decoding_bytes, denoising_bytes, encoding_bytes, hessian_bytes
from wanquant.wan.resources.offload import Needed, on_host, sizes_of, ways_of
from wanquant.wan.resources.probe import (
    around_seconds,
    block_seconds,
    decoding_seconds,
    encoding_seconds,
    is_small,
    other_blocks_seconds,
    small_pass,
)
from wanquant.wan.resources.timing import begin, is_busy

GUESS = "; a guess: the machine is busy"


@dataclass(frozen=True)
class ResourceEstimate:
    """Memory and time for the pipeline of these ``files``, which makes ``counts`` videos in batches of ``rows``."""

    files: ModelFiles
    scheme: Scheme
    protected: Sequence[int]
    modules: Sequence[str]
    settings: GenerationConfig
    counts: VideoCounts
    rows: int
    device: torch.device
    #: Of a model that is quantized already: its linears that are.
    names: Sequence[str] | None = None
    #: Where the weights wait: a way of ``wanquant.wan.resources.placement``.
    offload: str = "none"
    loras: int = 0  #: Bytes of LoRAs beside the weights.
    hessian_blocks: int = 1  #: Of how many blocks the Hessians are found at a time, where error feedback needs them.
    #: Seconds of the job's further stages, by name.
    further: Callable[[ResourceEstimate], dict[str, float]] = field(default=lambda plan: {}, compare=False)

    @cached_property
    def shape(self) -> Transformer:
        return shape_of_whole(self.files)

    @cached_property
    def report(self) -> ConversionReport:
        return plan_conversion(self.shape, self.scheme, self.protected, self.modules)

    @cached_property
    def parameters(self) -> int:
        return parameters_of(self.shape)

    @property
    def others(self) -> int:
        """Bytes of text encoder, VAE, and the encoder of pictures where there is one."""
        return self.text_encoder[0] + self.vae

    @cached_property
    def text_encoder(self) -> tuple[int, int]:
        """Bytes, and those of the two largest layers that follow each other."""
        kinds = self.given.family.text_encoders.items()
        encoders = [empty_encoder(self.files.folder / name, kind) for name, kind in kinds]
        layers = [[2 * size for size in sizes_of_layers(each)] for each in encoders]
        largest = max(max(map(sum, pairwise(layer for layer in each if layer))) for each in layers)
        return 2 * sum(map(parameters_of, encoders)), largest

    @cached_property
    def vae(self) -> int:
        """With the encoder of pictures and LoRAs beside the weights, which stay on the device as it does."""
        folder, family = self.files.folder, self.given.family
        wide = [empty_vae(folder / "vae", family)]
        if (folder / IMAGE_ENCODER).is_dir():
            wide.append(empty_encoder(folder / IMAGE_ENCODER, family.image_encoder))
        return 4 * sum(map(parameters_of, wide)) + self.loras

    @cached_property
    def given(self) -> Given:
        return Given.of(self.files.folder)

    @cached_property
    def converted(self) -> list[str]:
        return list(self.report.names("converted") if self.names is None else self.names)

    @cached_property
    def _linears(self) -> list[Any]:
        return [self.shape.get_submodule(name) for name in self.converted]

    @cached_property
    def quantized_weights(self) -> int:
        return sum(linear.weight.numel() for linear in self._linears)

    @cached_property
    def fed_weights(self) -> int:
        """The same, each times the channels that its error is fed to."""
        return sum(linear.weight.numel() * linear.in_features for linear in self._linears)

    @cached_property
    def codes(self) -> int:
        """Bytes of the quantized weights as codes, with their scales."""
        return sum(self.scheme.packed_bytes(linear) for linear in self._linears)

    @cached_property
    def packed(self) -> int:
        """Bytes of the transformers with codes for weights, as they are stored."""
        return 2 * (self.parameters - self.quantized_weights) + self.codes

    @property
    def weights(self) -> int:
        """Bytes of the transformers as they are loaded."""
        return self.packed if self.names is not None and self.scheme.packed else 2 * self.parameters

    @property
    def activations(self) -> int:
        """Bytes, of the largest there are: denoising, quantized or not, decoding, or encoding a first frame."""
        return max(self.each_activations)

    @cached_property
    def each_activations(self) -> tuple[int, int]:
        """Of denoising, and of the VAE."""
        longest = max(self.settings.num_frames, self.counts.longest)
        settings, vae = replace(self.settings, num_frames=longest, steps=1), self.files.folder / "vae"
        family, how = self.given.family, (settings, self.rows, self.device, self.given)
        config = family.sized(self._config, [2] * len(family.block_lists))  # those of more blocks are the same
        denoising = max(denoising_bytes(config, kind, *how) for kind in (None, self._quantized))
        coding = decoding_bytes(vae, self.settings, self.given.family) if self.counts.decoded else 0
        if self.given.picture:  # of which the further frames are empty, or none
            coding = max(coding, encoding_bytes(vae, settings, 1 if self.given.timestep_per_token else longest))
        return denoising, coding

    @property
    def videos(self) -> int:
        """Bytes of what was decoded, which the host keeps until all is compared."""
        settings = self.settings
        return 12 * self.counts.held * settings.num_frames * settings.height * settings.width

    @cached_property
    def hessian(self) -> int:
        """Bytes of the Hessians of a block's inputs, which calibration sums for error feedback; 0 without."""
        if not (self.scheme.feedback and self.counts.calibrated and self.names is None):
            return 0
        everywhere = plan_conversion(self.shape, self.scheme, (), self.modules).names("converted")
        names = tuple(dict.fromkeys(name.split(".", 2)[2] for name in everywhere))
        return hessian_bytes(self._config, names, self.settings, self.given)

    @cached_property
    def feeding(self) -> int:
        """Bytes that error feedback takes on the device: of the Hessians, then while it rounds the largest linear."""
        if not (self.scheme.feedback and self.counts.any_quantized and self.names is None):
            return 0
        return max([self.hessian_blocks * self.hessian, *map(feedback_bytes, self._linears)])

    @property
    def added(self) -> int:
        """Bytes on the device beside what was there before. Where that is the host, the files of the weights stay
        mapped while anything of them is used, so that what is quantized comes beside them, and so do the videos."""
        if self.offload != "none" and self.device.type != "cpu":
            return self.ways[self.offload].card
        videos = self.videos if self.device.type == "cpu" else 0
        beside = max(self.beside, self.feeding)
        return self.weights + self.others + self.activations + beside + videos

    @property
    def beside(self) -> int:
        """Bytes of quantized blocks that stand beside those of BF16."""
        new = self.device.type == "cpu" and self.counts.any_quantized and self.names is None
        rounded = (self.codes if self.scheme.packed else 2 * self.quantized_weights) if new or self.counts.beside else 0
        inside = sum(m.weight.numel() for m in self.shape.blocks.modules() if isinstance(m, nn.Linear))
        return max(rounded, inside if self.counts.all_beside else 0)

    @cached_property
    def ways(self) -> dict[str, Needed]:
        """What each way of placing the weights needs."""
        sizes = sizes_of(self)
        return on_host(sizes) if self.device.type == "cpu" else ways_of(sizes)

    @property
    def recorded(self) -> int:
        """Bytes on the disk of the recorded trajectories, in BF16: of each step what the model took, and what it gave
        by branch."""
        each, total = 2 * (self.settings.together + self.settings.branches) * int(self._config["in_channels"]), 0
        for steps, frames in self.counts.recorded_steps:
            total += steps * each * math.prod(self.given.latents(replace(self.settings, num_frames=frames)))
        return total

    @property
    def seconds(self) -> float:
        """Of the stages, with nothing in the cache; not of starting the program, planning and the report."""
        return sum(self.stages.values())

    @property
    def stages(self) -> dict[str, float]:
        """Seconds, by the names that a run's timings have."""
        return self._probed[0]

    @property
    def guess(self) -> bool:
        """Whether others used the machine while it was probed."""
        return self._probed[1]

    @cached_property
    def _probed(self) -> tuple[dict[str, float], bool]:
        begin()
        return self._stages(), is_busy()

    def _stages(self) -> dict[str, float]:
        counts, (plain, mixed) = self.counts, self._denoising()
        vae = (self.files.folder / "vae", self.settings, self.device, self.given.family)
        decoding = decoding_seconds(*vae) if counts.decoded else 0.0
        chosen, tried = counts.choosing
        made = counts.bf16 - counts.calibrated - counts.floors - counts.recorded - chosen
        quantized = counts.quantized - counts.untrained - tried
        decoded = max(0, counts.decoded - counts.floors)
        share = decoded / max(1, made + quantized + counts.untrained)
        found = {
            "calibrate": self._calibrating() if counts.calibrated else 0.0,
            "choose": (chosen + counts.replays[0]) * plain + (tried + counts.replays[1]) * mixed,
            "data": counts.recorded * plain,
            "generate_bf16": made * (plain + share * decoding) + counts.other_lengths * plain,
            "noise_floor": counts.floors * (plain + decoding),
            "generate_untrained": counts.untrained * (mixed + share * decoding),
            "train": counts.looks * mixed,
            "single_steps": counts.replayed * mixed,
            "generate_quantized": quantized * (mixed + share * decoding),
        }
        names = dict(counts.renamed)
        return {names.get(name, name): seconds for name, seconds in {**found, **self.further(self)}.items() if seconds}

    def _denoising(self) -> tuple[float, float]:
        """Seconds for one video in BF16, and quantized."""
        plain, quantized = (self._one_pass(how, self.rows) for how in (None, self._quantized))
        touched = len({name.split(".")[1] for name in self.converted}) / len(self.shape.blocks)
        passes = self.settings.passes * self.settings.steps  # each through one transformer
        return passes * plain, passes * (touched * quantized + (1 - touched) * plain)

    def _calibrating(self) -> float:
        length, kinds = self.settings.max_text_length, self.given.family.text_encoders
        each = (encoding_seconds(self.files.folder / n, kind, length, self.device) for n, kind in kinds.items())
        encoding = sum(each)
        alone = self._one_pass(None, 1, Layout(("",), 1, 4, 1, self.scheme.needs_statistics))
        passes = self.settings.passes * self.settings.steps
        if self.hessian:  # x xᵀ is about as much work as the linears themselves
            alone += 2 * self._one_pass(None, 1) * math.ceil(len(self.shape.blocks) / self.hessian_blocks)
        return self.counts.calibrated * passes * alone + self.counts.prompts * encoding

    def _one_pass(self, how: Quantized | None, rows: int, layout: Layout | None = None) -> float:
        """Seconds of a forward pass through one transformer, ``rows`` videos together, for one of them."""
        parts, tokens = len(parts_of(self.shape)), tokens_of(self.settings, self.shape, self.given)
        family = self.given.family
        if parts == 1 and is_small(self._config, tokens, self.rows, family):
            return small_pass(self._config, how, self.settings, rows, self.device, layout, self.given)
        around = around_seconds(self._config, self.settings, rows, self.device, self.given)
        if not family.is_wan:
            given = (self.settings, rows, self.device, self.given, layout)
            return (around + other_blocks_seconds(self._config, how, *given)) / rows
        block = block_seconds(self._config, how, tokens, self.settings.max_text_length, rows, self.device, layout)
        return (around + len(self.shape.blocks) // parts * block) / rows

    @property
    def _config(self) -> dict[str, Any]:  # without where it comes from: what is probed is kept by it
        return {key: value for key, value in parts_of(self.shape)[0].config.items() if key[0] != "_"}  # type: ignore

    @cached_property
    def _quantized(self) -> Quantized | None:
        """A block with every linear quantized that any has so; None if there is none, or no video is made with it."""
        names = list(dict.fromkeys(name.split(".", 2)[2] for name in self.converted))
        return Quantized(names, self.scheme) if names and self.counts.any_quantized else None
