"""Where a model runs, and where its weights wait: on the device itself (``none``), on the host (``group``), or in files
that are mapped into the host's memory, read when they are asked for and given up where it is short (``disk``).

From the host diffusers' group offload brings a transformer block by block, on a card the next one while one runs, and
the text encoder layer by layer; the VAE stays on the device. A transformer has the hooks only while it runs
(``streamed``): in between its weights are plain tensors of the host, so that blocks are copied, replaced, quantized and
saved as ever. What is rounded is rounded on the device, so the numbers are those of a model that is there as a whole.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.hooks import apply_group_offloading
from safetensors import safe_open
from torch import nn

from wanquant.quant import QuantLinear
from wanquant.wan.checkpoints.checkpoint import check_keys, kept_in_fp32, weight_files
from wanquant.wan.checkpoints.sums import check_finite

M = TypeVar("M", bound=nn.Module)

HOST = torch.device("cpu")
#: Bytes from which on a tensor goes to a file of its own.
LARGE = 1 << 20
#: The attribute by which a transformer knows its placement.
PLACEMENT = "wanquant_placement"
#: The names under which diffusers registers what it hooks.
OFFLOADING = "group_offloading"
HOOKS = ("lazy_prefetch_group_offloading", "layer_execution_tracker", OFFLOADING)


@dataclass(frozen=True)
class Placement:
    """The model runs on ``device``. ``way`` is ``none``, ``group`` or ``disk``, whose files are made in ``folder``:
    they have no names, and are gone with the process however it ends."""

    device: torch.device
    way: str = "none"
    folder: Path | None = None

    @property
    def streams(self) -> bool:
        return self.way != "none"

    def put_(self, transformer: M, mapped: bool = False) -> M:
        """A transformer that was loaded, where it is to be; it knows from now on. ``mapped``: from files already."""
        if not self.streams:
            return transformer.to(self.device)
        setattr(transformer, PLACEMENT, self)
        for layer in transformer.modules():
            if isinstance(layer, QuantLinear):
                layer.keeps_codes = False
        return transformer if mapped else self.keep_(transformer)

    def keep_(self, module: M) -> M:
        """What was made on the device, where it waits."""
        if not self.streams:
            return module
        module.to(HOST)
        for child in module.modules():
            if isinstance(child, QuantLinear):
                child.keeps_codes = False  # they would stay on the device
        if self.way == "disk":
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.nbytes >= LARGE and tensor.untyped_storage().filename is None:
                    tensor.data = self._to_file(tensor.data)
        return module

    def there(self, module: M) -> M:
        """The module on the device: itself, or a copy."""
        return copy.deepcopy(module).to(self.device) if self.streams else module

    def encoder_(self, encoder: nn.Module) -> None:
        """The text encoder, which is never changed and keeps its hooks."""
        _attach(self.keep_(encoder), self.device, "leaf_level")

    def read(self, kind: Any, folder: Path) -> Any:
        """A transformer that is not quantized, as diffusers loads it in BF16, without ever being in memory as a whole:
        what has to be cast is written to files tensor by tensor, the rest stays in the checkpoint's own."""
        with init_empty_weights():
            model = kind.from_config(kind.load_config(folder))
        tensors: dict[str, torch.Tensor] = {}
        for name in weight_files(folder):
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    found = file.get_tensor(key)
                    check_finite({key: found}, folder / name)
                    cast = found.to(torch.float32 if kept_in_fp32(model, key) else torch.bfloat16)
                    new = cast is not found and cast.nbytes >= LARGE
                    tensors[key] = self._to_file(cast) if new else cast
        check_keys(model.state_dict(), tensors, folder)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def _to_file(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix="offload-")
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash of what writes to the map
                os.posix_fallocate(handle, 0, tensor.nbytes)
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
        return mapped.view(tensor.shape).copy_(tensor)


def placement_of(transformer: nn.Module) -> Placement:
    """Of a pipeline's transformer, or of two as one."""
    first: Any = getattr(transformer, "parts", (transformer,))[0]
    found: Placement = getattr(first, PLACEMENT, None) or Placement(next(first.parameters()).device)
    return found


@contextmanager
def streamed(transformers: Iterable[nn.Module]) -> Iterator[None]:
    """While entered, those that wait on the host run on their device."""
    waiting = [each for each in transformers if placement_of(each).streams]
    for each in waiting:
        _attach(each, placement_of(each).device, "block_level")
    try:
        yield
    finally:
        for each in waiting:
            _detach(each)


def _attach(module: nn.Module, device: torch.device, kind: str) -> None:
    where = {"onload_device": device, "offload_device": HOST}
    how: dict[str, Any] = {"offload_type": kind, "num_blocks_per_group": 1}
    if device.type != "cpu":
        how |= {"use_stream": True, "low_cpu_mem_usage": True}  # pinned while it is copied, and not twice in memory
    apply_group_offloading(module, **where, **how)


def _detach(module: nn.Module) -> None:
    """Also after an error, when some of it may be on the device."""
    for child in list(module.modules()):
        registry = getattr(child, "_diffusers_hook", None)
        if registry is None:
            continue
        offloading = registry.get_hook(OFFLOADING)
        if offloading is not None:
            offloading.group.offload_()
        for name in HOOKS:
            registry.remove_hook(name, recurse=False)
        if not registry.hooks:  # what is copied from now on is a plain module
            child.__dict__.pop("forward", None)
            del child._diffusers_hook
