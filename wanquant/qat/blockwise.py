"""One block after the other: each is trained to give, from inputs that carry the quantization error of the blocks
before it, what the BF16 block gives without any.

    minimize over the block's parameters   mean |b(x̂) - b'(x)|² / |b'(x)|²,     x̂ = what the trained blocks before gave

Beside the BF16 model there are one block's float32 weights, gradients and optimizer state, and the activations of one
batch inside it; what flows between blocks, three hidden states for each sample, is on the host. That is what lets a
model be trained on a card that could not hold its gradients. Nothing but the blocks is trained.

Some videos are set aside with all of their samples. A block whose error on them did not fall, as inference will run
it, keeps its weights, so that training can hardly make it worse than plain quantization does.

What is learned is kept block by block, so a killed run goes on in the block it was killed in, to the same numbers.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from wanquant.qat.config import AT_ONCE, LoopConfig
from wanquant.qat.data import Trajectories, shuffled_order
from wanquant.qat.loop import Hooks, Loop, Loss, Row, quiet
from wanquant.qat.loss import relative_error
from wanquant.qat.train_config import SET_ASIDE
from wanquant.quant.convert import freeze_into_, make_trainable_
from wanquant.quant.scheme import Scheme
from wanquant.quant.trainable import Training, trainable_linears
from wanquant.runs.files import write_atomic
from wanquant.runs.progress import Tick, progress
from wanquant.wan.experts import Experts
from wanquant.wan.resources.placement import placement_of, streamed

#: A loop for the block of this index, whose states are in this folder.
NewLoop = Callable[[nn.Module, Loss, Path, int], Loop]


@dataclass
class BlockInputs:
    """The inputs of a block, on the host: hidden states ``bf16`` and ``quantized`` [samples, tokens, width], as the
    blocks before it give them in BF16 and as trained, and what all blocks share. Samples ``aside`` are not learned
    from. ``trained_in`` is the type that a block in training takes; ``at_once`` samples pass together, one where they
    would share their scales."""

    bf16: torch.Tensor
    quantized: torch.Tensor
    text: torch.Tensor
    modulation: torch.Tensor
    rotary: Any
    device: torch.device
    aside: frozenset[int]
    trained_in: torch.dtype = torch.bfloat16
    at_once: int = AT_ONCE

    def __len__(self) -> int:
        return len(self.bf16)

    def learn(self, block: nn.Module, places: Sequence[int]) -> torch.Tensor:
        """The output of a block in training for these samples."""
        return self._call(block, self.quantized, torch.as_tensor(places), self.trained_in)

    def _call(
        self, block: nn.Module, hidden: torch.Tensor, rows: torch.Tensor, kind: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        given, text = (tensor[rows].to(self.device, kind) for tensor in (hidden, self.text))
        output: torch.Tensor = block(given, text, self.modulation[rows].to(self.device), self.rotary)
        return output

    @torch.no_grad()
    def through(self, block: nn.Module, hidden: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """The output of a block of inference for all samples, or for those at ``places``."""
        places = torch.arange(len(self)) if places is None else places
        outputs = torch.empty_like(hidden[: len(places)])
        for first in range(0, len(places), self.at_once):
            part = places[first : first + self.at_once]
            outputs[first : first + len(part)] = self._call(block, hidden, part).to("cpu", hidden.dtype)
        return outputs


class _Reached(Exception):
    pass


@torch.no_grad()
def record_block_inputs(
    transformer: nn.Module, samples: Trajectories, places: Sequence[int], device: torch.device
) -> BlockInputs:
    """The inputs of the first block for these samples."""
    given: list[tuple[torch.Tensor, ...]] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        given.append((*(part.cpu() for part in args[:3]), args[3]))
        raise _Reached

    with streamed([transformer]), transformer.get_submodule("blocks.0").register_forward_pre_hook(stop):
        for first in range(0, len(places), AT_ONCE):
            batch = samples.of(places[first : first + AT_ONCE])
            inputs = (batch.noisy.to(device), batch.timestep.to(device), batch.text.to(device))
            with suppress(_Reached):
                transformer(*inputs, return_dict=False)
    hidden, text, modulation = (torch.cat([call[part] for call in given]) for part in range(3))
    return BlockInputs(hidden, hidden.clone(), text, modulation, given[0][3], device, set_aside(samples, places))


def set_aside(samples: Trajectories, places: Sequence[int]) -> frozenset[int]:
    """Which of the places are not learned from: all samples of every eighth video, and of one at least."""
    videos = [samples.video_of(place) for place in places]
    kept = sorted(set(videos))[::SET_ASIDE]
    return frozenset(number for number, video in enumerate(videos) if video in kept)


def split_samples(transformer: nn.Module, samples: Trajectories, places: Sequence[int]) -> list[list[int]]:
    """The places by the transformer that denoises at their timesteps: all for one, shared out among Wan2.2's two.
    ``ValueError`` where one has too few videos to set some aside."""
    shares = [list(places)]
    if isinstance(transformer, Experts):
        parts = transformer.part_of(torch.tensor([samples.recording.timestep(place) for place in places])).tolist()
        count = len(transformer.parts)
        shares = [[p for p, part in zip(places, parts, strict=True) if part == number] for number in range(count)]
    for number, share in enumerate(shares, 1):
        if len({samples.video_of(place) for place in share}) < 2:
            which = "" if len(shares) == 1 else f" of transformer {number} of {len(shares)}"
            raise ValueError(f"qat.scope=blockwise: fewer than two videos have samples{which}")
    return shares


def trainable_block(
    block: nn.Module, index: int, scheme: Scheme, modules: Sequence[str], stats: Mapping[str, Any], how: Training
) -> nn.Module:
    """A copy of the block in float32, trainable, outside of its model. ``stats`` are by names in the model."""
    holder = nn.Module()
    holder.blocks = nn.ModuleList([copy.deepcopy(block)])
    prefix = f"blocks.{index}."
    own = {"blocks.0." + name.removeprefix(prefix): s for name, s in stats.items() if name.startswith(prefix)}
    make_trainable_(holder, scheme, (), modules, own, how)
    found: nn.Module = holder.blocks[0]
    return found.float().requires_grad_(True)


@dataclass
class Blockwise:
    """``make`` gives a copy of the BF16 block made trainable, or None for one that is not quantized; ``config`` is that
    of the loop of one block. Only the ``chosen`` are trained, the others quantized as they are. Blocks are numbered
    from ``first``."""

    accelerator: Accelerator
    transformer: nn.Module
    inputs: BlockInputs
    make: Callable[[int, nn.Module], nn.Module | None]
    chosen: Collection[int]
    new_loop: NewLoop
    config: LoopConfig
    folder: Path
    show: Callable[[Row], None] = lambda row: None
    first: int = 0

    def run(self) -> list[Row]:
        """Trains every block in place, so that the transformer is quantized at the end; a row of each."""
        blocks, rows = self.transformer.get_submodule("blocks"), list[Row]()
        assert isinstance(blocks, nn.ModuleList)
        placed = placement_of(self.transformer)
        total, main = self.config.steps * len(self.chosen), self.accelerator.is_main_process
        known = [index for index in self.chosen if (self.folder / f"block-{index:03d}" / "row.json").is_file()]
        if known and main:
            print(f"training goes on: {len(known)} of {len(self.chosen)} blocks are known", file=sys.stderr, flush=True)
        with progress("train", total, "step") if main else nullcontext(quiet) as tick:
            for index, waiting in enumerate(blocks, self.first):
                block = placed.there(waiting)
                target = self.inputs.through(block, self.inputs.bf16)
                trainable = self.make(index, block)
                trained = trainable is not None
                if trainable is not None:
                    if index in self.chosen:
                        rows.append(self._train(index, block, trainable, target, tick))
                    block = _frozen(block, trainable)
                    del trainable  # before the next one is made
                self.inputs.quantized = self.inputs.through(block, self.inputs.quantized)
                self.inputs.bf16 = target
                if trained:
                    blocks[index - self.first] = placed.keep_(block)
        return rows

    def _train(self, index: int, original: nn.Module, block: nn.Module, target: torch.Tensor, tick: Tick) -> Row:
        """Puts the trained weights into ``block``, from the folder or learned now."""
        folder = self.folder / f"block-{index:03d}"
        weights, report = folder / "trained.safetensors", folder / "row.json"
        if report.is_file():
            known: Row = json.loads(report.read_text(encoding="utf-8"))
            block.load_state_dict(load_file(weights))
            for _ in range(self.config.steps):
                tick(f"block {index}, known")
            return known
        row = self._learn(index, original, block, target, folder / "states", tick)
        kept = {name: value.detach().contiguous().cpu() for name, value in block.state_dict().items()}
        if self.accelerator.is_main_process:
            save_file(kept, weights)
            write_atomic(report, json.dumps(row) + "\n")
            shutil.rmtree(folder / "states", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return row

    def _learn(
        self, index: int, original: nn.Module, block: nn.Module, target: torch.Tensor, folder: Path, tick: Tick
    ) -> Row:
        before = self._error(original, block, target)
        loop = self.new_loop(block, self._loss(index, target), folder, index)
        for _ in range(loop.done):
            tick(f"block {index}, known")

        def show(row: Row) -> None:
            self.show({**row, "block": index, "step": index * self.config.steps + row["step"]})

        curves = loop.run(hooks=Hooks(show=show), tick=lambda note="": tick(f"block {index}, {note}"))
        if loop.average is not None:
            loop.average.settle()
        loop.release()
        after = self._error(original, block, target)
        if not after < before:  # as it was made: a copy of it kept meanwhile would be another block in memory
            untrained = self.make(index, original)
            assert untrained is not None
            block.load_state_dict(untrained.state_dict())
        losses = [row["loss"] for row in curves.rows]
        clipped = sum(int(layer.clipped) for layer in trainable_linears(block).values())
        report = {"block": index, "before": before, "after": after, "kept": after < before}
        return {**report, "losses": losses, "clipped": clipped}

    def _loss(self, index: int, target: torch.Tensor) -> Loss:
        inputs, size = self.inputs, self.config.batch
        learned = [place for place in range(len(inputs)) if place not in inputs.aside]

        def loss(model: nn.Module, step: int, rows: range) -> dict[str, torch.Tensor]:
            taken = shuffled_order(len(learned), self.config.seed + index, step * size, size)[rows.start : rows.stop]
            places = [learned[place] for place in taken]
            output = inputs.learn(model, places)
            return {"loss": relative_error(output, target[torch.as_tensor(places)].to(output.device)).mean()}

        return loss

    def _error(self, original: nn.Module, trained: nn.Module, target: torch.Tensor) -> float:
        """Of the trained block as inference will run it, on the samples set aside."""
        places = torch.as_tensor(sorted(self.inputs.aside))
        found = self.inputs.through(_frozen(original, trained), self.inputs.quantized, places)
        return float(relative_error(found, target[places]).mean())


def _frozen(original: nn.Module, trained: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(original)
    freeze_into_(frozen, trained)
    return frozen
