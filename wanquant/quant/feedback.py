"""Error feedback (GPTQ, arXiv 2210.17323): a weight is rounded column by column, and the error of each column is made
up for in those that are not rounded yet, as far as the layer's inputs are correlated.

    H = Σ x xᵀ over calibration, damped;  H⁻¹ = Uᵀ U, U upper triangular
    e = (w_i - Q(w_i)) / U_ii;  w_j ← w_j - e U_ij for j > i

Columns keep their order. Those of 128 are updated at once with the errors of the 128 before. A scale outside of the
blocks is found beforehand, as without feedback; that of a block where its first column is reached, from the weights as
they are then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from wanquant.formats.base import Format
from wanquant.formats.blocks import BlockFormat
from wanquant.quant.rotate import Rotation, rotate, rotation_of, signs
from wanquant.quant.scheme import Rounded, Scheme

#: Of the mean of the Hessian's diagonal, what is added to all of it.
DAMPING = 0.01
#: Columns whose errors are fed forward together; every format's blocks divide it.
BATCH = 128
#: Rows of an input that are widened at a time.
ROWS = 4096
FILE = "hessians.safetensors"


def changed_hessian(
    hessian: torch.Tensor | None, divisors: torch.Tensor | None, rotation: Rotation | None
) -> torch.Tensor:
    """Of an input whose channels are divided by ``divisors``, float32 [in], and then rotated."""
    assert hessian is not None, "error feedback needs the Hessian of the input"
    if divisors is not None:
        hessian = hessian.to(divisors.device) / divisors / divisors[:, None]
    if rotation is not None:
        by = rotation_of(signs(rotation.size).to(hessian.device))
        hessian = rotate(rotate(hessian, by).T, by)
    return hessian


@torch.no_grad()
def quantize_with_feedback(scheme: Scheme, source: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> Rounded:
    """As ``Scheme.quantize_weight``, which has found the ``scale``, float32 [out] or []: of a weight [out, in], by the
    ``hessian`` of its input, float32 [in, in]. ``ValueError`` where that is not finite."""
    if hessian.shape != (source.shape[1],) * 2:
        raise ValueError(f"a Hessian of an input of {source.shape[1]} channels is no {tuple(hessian.shape)}")
    if not hessian.isfinite().all():
        raise ValueError("quant.weights.feedback=true: its input was not finite in calibration")
    factor = inverse_factor(hessian.to(source.device))
    # Columns as rows, which are contiguous.
    weight = (source.float() / (scale[:, None] if scale.ndim else scale)).T.contiguous()
    rounded = torch.empty_like(weight, dtype=torch.bfloat16)
    over = torch.zeros((), dtype=torch.int64, device=source.device)
    for first in range(0, len(weight), BATCH):
        past = min(first + BATCH, len(weight))
        own = factor[first:past, first:past]
        errors = _round_batch(scheme.format, scheme.overflow, weight[first:past], rounded[first:past], own)
        over += (weight[first:past].abs() >= scheme.format.overflow).sum()
        weight[past:] -= factor[first:past, past:].T @ errors
    return rounded.T.contiguous(), scale, over


def _round_batch(
    format_: Format, overflow: str, weight: torch.Tensor, rounded: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Rounds columns, each a row of ``weight`` [columns, out], into ``rounded``; their errors, in the same shape. What
    is not finite feeds nothing forward, so that it stays alone, as without feedback."""
    errors = torch.empty_like(weight)
    for index, column in enumerate(weight):
        if not isinstance(format_, BlockFormat):
            rounded[index] = format_.round(column, overflow)
        else:
            place = index % format_.block
            if place == 0:
                round_column = format_.column_rounder(weight[index : index + format_.block].T.contiguous())
            rounded[index] = round_column(column, place)
        error = (column - rounded[index].float()) / factor[index, index]
        errors[index] = torch.where(error.isfinite(), error, 0.0)
        weight[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
    return errors


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U of the damped Hessian, float32, found in float64 without inverting it: H = M Mᵀ with M upper triangular, which
    is Cholesky's factorization from the end, and U = M⁻¹. The identity's multiple for an input that was always 0."""
    where = hessian.device if hessian.is_cuda else torch.device("cpu")  # others have no float64
    turned = hessian.to(where, torch.float64).flip(0, 1)
    damping = DAMPING * turned.diagonal().mean()
    turned.diagonal().add_(torch.where(damping > 0, damping, 1.0))
    lower = torch.linalg.cholesky(turned)
    identity = torch.eye(len(lower), out=turned)
    torch.linalg.solve_triangular(lower, identity, upper=False, out=identity)
    del lower
    upper: torch.Tensor = identity.to(hessian.device, torch.float32).flip(0, 1)
    return upper


def feedback_bytes(linear: nn.Linear) -> int:
    """That ``quantize_with_feedback`` takes beside the weight and its rounded one, at most."""
    columns, rows = linear.in_features, linear.out_features
    # The Hessian, twice where it is rotated, and two matrices of float64; or the factor, and copies of the weight.
    return 4 * columns * max(6 * columns, 2 * columns + 4 * rows)


class HessianObserver(Mapping[str, torch.Tensor]):
    """While entered sums x xᵀ of the inputs of these linears, float32 [in, in], where the inputs are; by linear. Those
    that are given one tensor (Q, K and V) have one sum."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, names
        self._sums: dict[str, torch.Tensor] = {}
        #: By linear the one whose sum is its too.
        self._owners: dict[str, str] = {}
        self._seen: MutableMapping[torch.Tensor, tuple[int, str]] = WeakTensorKeyDictionary()
        self._hooks = ExitStack()

    def __enter__(self) -> HessianObserver:
        for name in self._names:
            linear = self._module.get_submodule(name)
            self._hooks.enter_context(linear.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sums[self._owners[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    @torch.no_grad()
    def _see(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        tensor = inputs[0].detach() if inputs[0].requires_grad else inputs[0]
        known = self._seen.get(tensor)
        owner = known[1] if known is not None and known[0] == tensor._version else name
        if self._owners.setdefault(name, owner) != owner:
            raise RuntimeError(f"{name} gets the same input as {self._owners[name]} in some passes, in others not")
        if owner == name:
            self._seen[tensor] = tensor._version, name
            rows = tensor.reshape(-1, tensor.shape[-1])
            if name not in self._sums:
                self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            add_outer_products_(self._sums[name], rows)

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for total in self._sums.values())

    def save(self, names: Sequence[str], folder: Path) -> None:
        """Of these linears, into a file of this folder: each sum once, by the first of them that has it."""
        first: dict[str, str] = {}
        owners = {name: first.setdefault(self._owners[name], name) for name in names}
        save_file({name: self[name].cpu() for name in first.values()}, folder / FILE, metadata=owners)


def add_outer_products_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Σ x xᵀ of these rows [rows, in], in float32."""
    for part in rows.split(ROWS):
        if part.is_cuda and part.dtype == torch.bfloat16:  # which a card multiplies exactly and sums in float32
            total += torch.mm(part.T, part, out_dtype=torch.float32)
        else:
            wide = part.float()
            total.addmm_(wide.T, wide)


class StoredHessians(Mapping[str, torch.Tensor]):
    """What ``HessianObserver.save`` wrote into these folders, by linear; each is read when it is asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        for folder in folders:
            with safe_open(folder / FILE, "pt") as file:
                self._places |= {name: (folder / FILE, owner) for name, owner in file.metadata().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, owner = self._places[name]
        with safe_open(path, "pt") as file:
            found: torch.Tensor = file.get_tensor(owner)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
