"""A low-rank branch beside the quantized weight (SVDQuant, arXiv 2411.05007).

    x W = x (D U) + Q(x) Q(W - D U)

D U, of a few ranks, holds the largest singular values of W and stays in BF16, as its input does. With smoothing the
outliers of the activations are in the weight by then, and go into the branch.
"""

from __future__ import annotations

import torch

#: Passes of subspace iteration, and columns beside those asked for (Halko et al., arXiv 0909.4061).
ITERATIONS, MORE = 6, 16


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` [out, rank] and ``down`` [rank, in] in BF16, whose product is nearest to a float32 weight [out, in]."""
    count = min(rank + MORE, *weight.shape)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(weight.shape[1], count, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    shares = values[:rank].sqrt()
    up, down = basis @ left[:, :rank] * shares, shares[:, None] * right[:rank]
    return up.to(torch.bfloat16), down.to(torch.bfloat16)
