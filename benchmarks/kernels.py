"""The price of HiF8: kernels, linears, a whole transformer, and what the same costs elsewhere.

    python -m benchmarks.kernels                 prints the table; takes some minutes
    python -m benchmarks.kernels --write         and writes it to benchmarks/results/

Every time is a ratio to something timed in turn with it, but for a process's first call, which has a bar in seconds.
``pip install -e '.[bench]'`` brings what is compared with.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import en_dtypes
import numpy as np
import torch
from torch import nn

from benchmarks.timing import Row, compare, table
from wanquant import load_pipeline, quantize_
from wanquant.formats import hif8
from wanquant.quant import QuantConfig, QuantLinear
from wanquant.quant.scheme import parse
from wanquant.wan.experts import shape_of_whole

ELEMENTS = 1 << 25
TOKENS = 2048
LINEARS = ((5120, 5120), (5120, 13824))


def elementwise() -> Iterator[Row]:
    x = torch.randn(ELEMENTS)
    for dtype, bar in ((torch.bfloat16, 4.0), (torch.float32, 3.0)):
        values = x.to(dtype)
        out, copied = torch.empty_like(values), torch.empty_like(values)
        short = str(dtype).removeprefix("torch.")
        yield compare(
            f"round {short}, out=", partial(hif8.round, values, out=out), "copy_", partial(copied.copy_, values), bar
        )
    values = x.to(torch.bfloat16)
    codes = hif8.encode(values)
    yield compare("round bfloat16", lambda: hif8.round(values), "clone", values.clone, 1.5)
    yield compare("encode bfloat16", lambda: hif8.encode(values), "clone", values.clone, 1.5)
    yield compare("decode to bfloat16", lambda: hif8.decode(codes), "clone of bfloat16", values.clone, 1.5)
    yield compare(
        "round bfloat16",
        lambda: hif8.round(values),
        "float8_e4m3fn and back",
        lambda: values.to(torch.float8_e4m3fn).to(torch.bfloat16),
        1 / 6,
        rounds=7,
    )
    eight, out, back = (torch.empty_like(values, dtype=t) for t in (torch.float8_e4m3fn, values.dtype, values.dtype))
    yield compare(
        "round bfloat16, out=",
        lambda: hif8.round(values, out=out),
        "float8_e4m3fn and back, into warm tensors",
        lambda: back.copy_(eight.copy_(values)),
        1 / 6,
        rounds=7,
    )
    part = x[: ELEMENTS // 8].numpy()
    yield compare(
        "round float32, 4 M",
        lambda: hif8.round(x[: ELEMENTS // 8]),
        "en_dtypes and back",
        lambda: part.astype(en_dtypes.hifloat8).astype(np.float32),
        rounds=7,
    )
    yield compare(
        "round_stochastic float32, 4 M", lambda: hif8.round_stochastic(x[: ELEMENTS // 8]), "torch.rand_like",
        lambda: torch.rand_like(x[: ELEMENTS // 8]), rounds=7,
    )  # fmt: skip


def linears() -> Iterator[Row]:
    x = torch.randn(TOKENS, LINEARS[0][0]).to(torch.bfloat16)
    for shape in LINEARS:
        linear = nn.Linear(*shape, dtype=torch.bfloat16)
        name = f"linear {shape[0]} to {shape[1]}, {TOKENS} tokens"
        for label, config, bar in (
            ("fast", QuantConfig(), 1.1),
            ("packed", QuantConfig(packed=True), 1.25),
            ("exact", QuantConfig(product="exact"), 2.8),
        ):
            layer = QuantLinear.from_linear(linear, parse(config))
            yield compare(f"{name}, {label}", partial(layer, x), "BF16 linear", partial(linear, x), bar, rounds=7)
        fake = torchao_linear(linear)
        if fake is not None:
            yield compare(f"{name}, torchao FP8", partial(fake, x), "BF16 linear", partial(linear, x), rounds=5)


def torchao_linear(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """torchao's FP8 fake quantization of the same linear, dynamic per row; None where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import PerRow
    from torchao.quantization.qat import Float8FakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    config = Float8FakeQuantizeConfig(granularity=PerRow())
    fake: Callable[[torch.Tensor], torch.Tensor] = FakeQuantizedLinear.from_linear(linear, config, config)
    return fake


def transformer() -> Iterator[Row]:
    """One forward pass of tiny-wan with both branches of guidance, and what its weights take."""
    plain, quantized = (load_pipeline("tiny", device="cpu").transformer for _ in range(2))
    quantize_(quantized)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 8, 8).to(torch.bfloat16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 64, plain.config.text_dim).to(torch.bfloat16),
    }
    yield compare(
        "tiny-wan forward, all 400 linears",
        lambda: quantized(**inputs),
        "BF16",
        lambda: plain(**inputs),
        1.5,
        rounds=25,
    )
    quantize_(packed := load_pipeline("tiny", device="cpu").transformer, QuantConfig(packed=True))
    yield Row("tiny-wan, packed bytes", "BF16", size(packed), size(plain), 0.54)


def size(module: nn.Module) -> float:
    return float(sum(t.nbytes for t in (*module.parameters(), *module.buffers())))


def large_bytes() -> Iterator[Row]:
    """Of Wan2.1-T2V-14B, from its shape alone."""
    config = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "transformer").mkdir()
        (Path(folder) / "transformer" / "config.json").write_text(json.dumps(config))
        model = shape_of_whole(Path(folder)).to(torch.bfloat16)
    plain = size(model)
    scheme = parse(QuantConfig(packed=True))
    for name, child in list(model.blocks.named_modules()):
        if type(child) is nn.Linear:
            model.blocks.set_submodule(name, QuantLinear(child.in_features, child.out_features, True, scheme))
    yield Row("14B, packed bytes", "BF16", size(model), plain, 0.52)


def first_call() -> Iterator[Row]:
    """Seconds of a process's first rounding, with an empty cache of compiled code and with a full one."""
    program = (
        "import time, torch; from wanquant.formats import hif8; x = torch.randn(64); b = time.perf_counter();"
        "hif8.round(x); hif8.round(x.bfloat16()); print(time.perf_counter() - b)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", program]
        empty, full = (
            float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        )
    yield Row("first round of a process, nothing compiled", "3 s", empty, 3.0, 1.0)
    yield Row("first round of a process, compiled before", "3 s", full, 3.0, 1.0)


def machine() -> str:
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numba", "numpy", "en_dtypes")]
    if importlib.util.find_spec("torchao") is not None:
        versions.append(f"torchao {importlib.metadata.version('torchao')}")
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {', '.join(versions)}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    rows: list[Row] = []
    with torch.no_grad():
        for part in (first_call, elementwise, transformer, linears, large_bytes):
            begun = time.perf_counter()
            rows += part()
            print(f"{part.__name__}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    text = f"{table(rows)}\n\n{machine()}\n"
    print(text)
    if args.write:
        name = f"{datetime.datetime.now():%Y-%m-%d-%H%M}-kernels-{os.cpu_count()}-core.md"
        path = Path(__file__).parent / "results" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# The price of HiF8\n\n`python -m benchmarks.kernels --write`\n\n{text}")
        print(path)
    sys.exit(1 if any(row.verdict == "MISSED" for row in rows) else 0)


if __name__ == "__main__":
    main()
