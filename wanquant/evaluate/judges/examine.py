"""What is installed and which weights are there, as lines for the terminal; and fetching what is missing."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from wanquant.evaluate.judges import vbench, weights
from wanquant.kernels import npu
from wanquant.runs.signature import installed
from wanquant.wan.device import DEVICES, pick_device

#: What is asked for, by the package that brings it.
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "numba", "av", "wandb")
OPTIONAL = {
    "torchvision": vbench.INSTALL,
    "vbench": vbench.INSTALL,
    "pyiqa": vbench.INSTALL,
    "openai-clip": vbench.INSTALL,
    "timm": vbench.INSTALL,
    "decord": "a reader over PyAV takes its place",
    "torch_npu": "pip install 'wanquant[npu]', with CANN",
}
WORDS = {
    "published": "as published",
    "recorded": "as on record",
    "new": "not on record yet: its sum goes there when it is first used",
    "other": "NOT what it should be: fetch it again",
    "missing": "missing",
}
#: States of weights that cannot be used.
BAD = ("missing", "other")


def examine() -> list[str]:
    """Lines for the terminal."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    usable = [name for name in DEVICES[1:] if _usable(name)]
    lines += [f"devices: {', '.join(usable)}", *(chip_lines(pick_device("npu")) if "npu" in usable else [])]
    lines += ["", "packages"]
    for name in (*PACKAGES, *OPTIONAL):
        version = installed(name)
        lines.append(f"  {name:<14}{version or 'not installed: ' + OPTIONAL.get(name, 'reinstall wanquant')}")
    lines += ["", "dimensions of VBench"]
    judges = {**{name: name for name in vbench.DIMENSIONS}, "(LPIPS)": weights.LPIPS, "(RAFT)": weights.RAFT}
    lines += [f"  {shown:<24}{_state(name)}" for shown, name in judges.items()]
    lines += ["", f"weights in {_short(weights.vbench_root())}, {_short(weights.torch_root())}"]
    found = [weights.find(weight) for weight in weights.WEIGHTS]
    for each in found:
        lines.append(f"  {each.weight.recorded_as:<54}{each.sha256[:12] or '-':<14}{WORDS[each.state]}")
    if any(each.state in BAD for each in found):
        lines += ["", "`python -m wanquant.doctor fetch` gets what is missing, or the dimensions you name behind it"]
    return lines


def _short(path: Path) -> str:
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def chip_lines(device: torch.device) -> list[str]:
    """What a chip has of HiF8 itself, by trial."""
    lines = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for dtype in (torch.bfloat16, torch.float32):
            for overflow in ("inf", "saturate"):
                exact = npu.casts_exactly(device, dtype, overflow == "saturate")
                how = "its own cast, exact" if exact else "integer arithmetic"
                lines.append(f"  HiF8 from {str(dtype).removeprefix('torch.')}, overflow={overflow}: {how}")
    lines.append(f"  product=native: {'yes' if npu.multiplies(device) else 'no'}")
    return [*lines, *(f"  {line.message}" for line in said)]


def _usable(device: str) -> bool:
    try:
        pick_device(device)
    except ValueError:
        return False
    return True


def _state(name: str) -> str:
    """Whether a dimension can be measured here, found out as the measurement would."""
    lacking = [weight for weight in weights.needed([name]) if weights.find(weight).state in BAD]
    if name not in (weights.LPIPS, weights.RAFT):
        try:  # imported, ViCLIP fetches its vocabulary
            vbench.importable([] if name in weights.VICLIP and lacking else [name])
        except ValueError as error:
            return str(error)
    return f"needs {', '.join(weight.recorded_as for weight in lacking)}" if lacking else "ready"


def fetch(names: Sequence[str]) -> bool:
    """The missing weights of these dimensions, or of all; what cannot be had is told, and the others go on."""
    known = dict.fromkeys(name for weight in weights.WEIGHTS for name in weight.used_by)
    if not set(names) <= set(known):
        raise ValueError(f"weights are known of {', '.join(known)}")
    complete = True
    for weight in weights.needed(names or list(known)):
        if weights.find(weight).state not in BAD:
            print(f"there already: {weight.path}")
            continue
        print(f"fetching {weight.url}", flush=True)
        try:
            weights.fetch(weight)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            complete = False
    return complete
