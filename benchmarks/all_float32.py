"""Every one of the 2^32 float32 values against ``en_dtypes``, bit for bit; takes minutes.

python -m benchmarks.all_float32
"""

from __future__ import annotations

import multiprocessing
import os
import sys

import en_dtypes
import numpy as np
import torch

from wanquant.formats import hif8
from wanquant.runs.progress import progress

CHUNK = 1 << 24


def differences(first: int) -> int:
    """How many of the patterns ``first`` to ``first + CHUNK`` round otherwise."""
    torch.set_num_threads(1)
    bits = np.arange(first, first + CHUNK, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(en_dtypes.hifloat8).astype(np.float32)
    # Their zero keeps a sign and their NaN a payload; ours has one of each.
    expected = np.where(expected == 0, np.float32(0), expected)
    expected = np.where(np.isnan(expected), np.float32(np.nan), expected)
    got = hif8.round(torch.from_numpy(x)).numpy()
    again = hif8.decode(hif8.encode(torch.from_numpy(x)), torch.float32).numpy()
    wrong = (got.view(np.uint32) != expected.view(np.uint32)) | (again.view(np.uint32) != expected.view(np.uint32))
    return int(wrong.sum())


def main() -> None:
    starts = range(0, 1 << 32, CHUNK)
    found = 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool, progress("compare", len(starts)) as tick:
        for count in pool.imap_unordered(differences, starts):
            found += count
            tick()
    print(f"{1 << 32:,} float32 values, {found:,} differences")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
