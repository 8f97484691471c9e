"""Rounds in forked children after torch and our own threads have been at work in the parent. Run by ``test_threads``,
in a process that has no other threads: a fork copies the locks they may hold."""

from __future__ import annotations

import hashlib
import multiprocessing

import torch

from wanquant.formats import hif8

LARGE = torch.randn(1 << 20).to(torch.bfloat16)


def digest_of_rounded(_: int) -> str:
    """Without further torch operations: those that run in parallel hang in a forked child, on their own account."""
    return hashlib.sha256(hif8.round(LARGE).view(torch.int16).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = digest_of_rounded(0)
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(digest_of_rounded, range(4)).get(timeout=60) == [expected] * 4
