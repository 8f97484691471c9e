"""What a CUDA card makes of the kernels: are all bits right, and what does each costs beside BF16 and a copy?

    python -m benchmarks.card [--out benchmarks/results] [--budget 410] [--only bits,linears]
    python -m benchmarks.card --device cpu --small      the program itself, tried where there is no card

Ends within the budget of seconds: a part is begun only while there is time for it. Every time is a ratio to something
timed in turn with it. What fails is told in the table, and the other parts go on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from benchmarks.random_wan import SHAPES
from benchmarks.timing import Row, compare, table
from wanquant.formats import hif8
from wanquant.formats.blocks import HIF4, INT4_128, MXFP6, NVFP4
from wanquant.kernels import blocks, descale, eager, quantize_rows_coded, quantize_rows_hif8, round_blocks
from wanquant.quant import QuantConfig, QuantLinear, quantize_
from wanquant.quant.eight_bit import check_product
from wanquant.quant.scheme import parse

#: Of the 14B: features in and out of its linears, and the tokens of 81 frames of 832x480.
LINEARS = ((5120, 5120), (5120, 13824), (13824, 5120))
TOKENS = (4096, 32_760)
ELEMENTS = 1 << 27
#: Of a linear with each product over one in BF16: ``fp8`` less where its weight is largest beside its input.
BARS = {"fast": 1.2, "packed": 1.2, "exact": 5.0, "fp8": 0.72, "nvfp4": 1.4, "hif4": 1.4}
WIDE_BAR = 0.62
#: Calls between two looks at the clock take this long, in seconds.
AT_LEAST = 0.02


@dataclass(frozen=True)
class Place:
    """Where it is measured, and how large."""

    device: torch.device
    small: bool

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(self, name: str, ours: Callable[[], Any], beside: str, theirs: Callable[[], Any], bar: float) -> Row:
        """By turns, each so often that the start of a kernel does not count, in seconds of one call. Bars are for full
        size on a card."""
        counts = [self._count(call) for call in (ours, theirs)]
        calls = [partial(self._repeat, call, count) for call, count in zip((ours, theirs), counts, strict=True)]
        row = compare(name, calls[0], beside, calls[1], self.bar(bar), rounds=self.size(9, 2))
        return replace(row, ours=row.ours / counts[0], theirs=row.theirs / counts[1])

    def bar(self, of_card: float) -> float | None:
        return of_card if self.device.type == "cuda" and not self.small else None

    def _count(self, call: Callable[[], Any]) -> int:
        for _ in range(2):
            begun = time.perf_counter()
            call()
            self.wait()
            took = time.perf_counter() - begun
        return 1 if self.small else max(1, min(200, int(AT_LEAST / max(took, 1e-5))))

    def _repeat(self, call: Callable[[], Any], count: int) -> None:
        for _ in range(count):
            call()
        self.wait()


Rows = Iterator[Row]


def bits(place: Place) -> Rows:
    """Elements in which the device's own ops differ from the definition in integers, of so many."""
    generator, counted = torch.Generator().manual_seed(7), {"elements": 0, "wrong": 0}

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        counted["elements"] += expected.numel()
        wrong = int((found.cpu().contiguous().view(whole) != expected.contiguous().view(whole)).sum())
        counted["wrong"] += wrong

    def move(*tensors: torch.Tensor | None) -> list[Any]:
        return [None if each is None else each.to(place.device) for each in tensors]

    for saturate, x in itertools.product((False, True), patterns(place, generator)):
        (there,) = move(x)
        out = torch.empty_like(there)
        torch.ops.wanquant.round_hif8_out(there, saturate, out)
        for found in (out, torch.ops.wanquant.round_hif8(there, saturate)):
            same(found, eager.round_hif8(x, saturate))
        same(torch.ops.wanquant.encode_hif8(there, saturate), eager.encode_hif8(x, saturate))
    for rows, columns, whole in SIZES[:1] if place.small else SIZES:
        for dtype, x in matrices(rows, columns, generator):
            powers = torch.ldexp(torch.ones(columns), torch.arange(columns) % 7 - 3)
            for choice, factors in itertools.product((False, True), (None, powers)) if whole else [(False, None)]:
                for op, how in row_ops(choice, torch.rand(rows, generator=generator) + 0.01):
                    there = [move(each)[0] if torch.is_tensor(each) else each for each in (*how, factors)]
                    ours = getattr(torch.ops.wanquant, op)(*move(x), *there)
                    for found, expected in zip(ours, getattr(eager, op)(x, *how, factors), strict=True):
                        same(found, expected)
            scales = (torch.rand(rows, generator=generator), torch.rand(columns, generator=generator))
            bias = torch.randn(columns, generator=generator).to(dtype)
            for result in (torch.float32, torch.bfloat16):
                ours = torch.ops.wanquant.descale(*move(x, *scales, bias), result)
                same(ours, eager.descale(x, *scales, bias, result))
    for format_, (_, x) in itertools.product(BLOCKED, matrices(33, place.size(5120, 256), generator)):
        scale, powers = torch.rand(len(x), generator=generator) + 0.01, torch.ones(x.shape[1])
        for by, factors in ((scale, None), (torch.tensor(0.37), powers * 4)):
            ours = torch.ops.wanquant.round_blocks(*move(x, by), *format_.how, *move(factors))
            for found, expected in zip(ours, blocks.round_blocks(x, by, *format_.how, factors), strict=True):
                same(found, expected)
    yield Row("elements that differ from the definition", "compared", counted["wrong"], counted["elements"], 0.0, True)


#: One of each kind of scale.
BLOCKED = (NVFP4, MXFP6, HIF4, INT4_128)
#: Rows, columns, and whether every choice is tried: each is compiled by itself.
SIZES = ((17, 1023, True), (33, 5120, False), (5, 13_824, False), (2, 100_003, False))


def matrices(rows: int, columns: int, generator: torch.Generator) -> Iterator[tuple[torch.dtype, torch.Tensor]]:
    x = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    x[-1, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        yield dtype, x.to(dtype)


def patterns(place: Place, generator: torch.Generator) -> list[torch.Tensor]:
    """Every pattern of BF16 and float16, and of float32 those beside every tie and many others."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    beside = torch.cat([(every << 16) | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    count = place.size(1 << 22, 1 << 12)
    drawn = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    of16 = every.to(torch.int16)
    return [torch.cat([beside, drawn]).view(torch.float32), of16.view(torch.bfloat16), of16.view(torch.float16)]


def row_ops(choice: bool, scale: torch.Tensor) -> list[tuple[str, tuple[Any, ...]]]:
    coded = [
        ("quantize_rows_coded", (grid, goal, choice, lift, lift))
        for grid, goal, lift in ((0, 15.0, 16.0), (1, 448.0, 1.0), (2, 127.0, 1.0))
    ]
    return [
        ("quantize_rows_hif8", (15.0, choice, choice)),
        ("scaled_round_hif8", (scale if choice else torch.tensor(0.37), choice)),
        *coded,
    ]


def elementwise(place: Place) -> Rows:
    x = torch.randn(place.size(ELEMENTS, 1 << 14), device=place.device).to(torch.bfloat16)
    out = torch.empty_like(x)
    copy = partial(out.copy_, x)
    yield place.compare("round, out=", lambda: hif8.round(x, out=out), "copy", copy, 1.1)
    yield place.compare("encode", lambda: hif8.encode(x), "copy", copy, 0.9)
    codes = hif8.encode(x)
    yield place.compare("decode", lambda: hif8.decode(codes), "copy", copy, 0.8)
    columns = place.size(5120, 128)
    rows = x[: x.numel() // columns * columns].view(-1, columns)
    yield place.compare("quantize_rows", lambda: quantize_rows_hif8(rows, 15.0, False), "clone", rows.clone, 1.15)
    how = (eager.CODED_HIF8, 15.0, False, 16.0, 256.0)
    yield place.compare("quantize_rows to codes", lambda: quantize_rows_coded(rows, *how), "clone", rows.clone, 1.15)
    one = torch.ones((), device=place.device)
    for format_ in BLOCKED:
        rounding = partial(round_blocks, rows, one, format_.how)
        yield place.compare(f"round_blocks {format_.name}", rounding, "clone", rows.clone, 2.0)
    scales = (torch.rand(len(rows), device=place.device), torch.rand(columns, device=place.device))
    bias = torch.randn(columns, device=place.device).to(torch.bfloat16)
    yield place.compare("descale", lambda: descale(rows, *scales, bias, torch.bfloat16), "clone", rows.clone, 1.2)


def configs(place: Place) -> dict[str, QuantConfig]:
    """Products that the device has."""
    known = {
        "fast": QuantConfig(),
        "packed": QuantConfig(packed=True),
        "exact": QuantConfig(product="exact"),
        "fp8": QuantConfig(product="fp8"),
        "fp8 packed": QuantConfig(product="fp8", packed=True),
        "e4m3 fp8": QuantConfig(format="e4m3", product="fp8"),
        "int8": QuantConfig(format="int8", product="int8"),
        "mxfp8 fp8": QuantConfig(format="mxfp8", product="fp8"),
        "nvfp4": QuantConfig(format="nvfp4"),
        "hif4": QuantConfig(format="hif4"),
        "nvfp4 fp4": QuantConfig(format="nvfp4", product="fp4"),
        "mxfp4 fp4": QuantConfig(format="mxfp4", product="fp4"),
    }
    found = {}
    for name, config in known.items():
        try:
            check_product(parse(config), place.device)
        except ValueError as error:
            print(f"  {name}: {error}", file=sys.stderr, flush=True)
        else:
            found[name] = config
    return found


def linears(place: Place) -> Rows:
    for tokens, (inside, outside) in itertools.product(TOKENS, LINEARS):
        if place.small:
            tokens, inside, outside = 32, 64, 128
        linear = nn.Linear(inside, outside, dtype=torch.bfloat16, device=place.device)
        spread = torch.exp(torch.randn(inside, device=place.device))
        x = (torch.randn(tokens, inside, device=place.device) * spread).to(torch.bfloat16)
        where = f"{tokens:,} tokens, {inside} to {outside}"
        reference = QuantLinear.from_linear(linear, parse(QuantConfig()))(x).float()
        for name, config in configs(place).items():
            bar = BARS.get("fp8" if "fp8" in name else name, 1.0)
            bar = WIDE_BAR if "fp8" in name and outside > inside and tokens == TOKENS[-1] else bar
            try:
                yield from one_linear(place, linear, config, x, reference, f"{name}, {where}", bar)
            except Exception as error:  # the others are worth having
                yield Row(f"linear {name}, {where}: {str(error).partition(chr(10))[0]}", "", math.nan, 1.0, bar)
        yield from torchao(place, linear, x, where)
        if place.small:
            return


def one_linear(
    place: Place,
    linear: nn.Linear,
    config: QuantConfig,
    x: torch.Tensor,
    reference: torch.Tensor,
    name: str,
    bar: float,
) -> Rows:
    layer, plain = QuantLinear.from_linear(linear, parse(config)), partial(linear, x)
    yield place.compare(f"linear {name}", partial(layer, x), "BF16", plain, bar)
    if config.format == "hif8":
        error = (layer(x).float() - reference).norm() / reference.norm()
        yield Row(f"error against fast, {name}", "1", float(error), 1.0, 0.01, True)
    if place.device.type == "cuda":
        yield Row(f"elements that differ in a CUDA graph, {name}", "1", graphed(layer, x), 1.0, 0.0, True)
    if config.product in ("fast", "fp8") and not config.packed:
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        yield place.compare(f"linear, compiled, {name}", partial(compiled, x), "BF16", plain, bar)


def graphed(layer: nn.Module, x: torch.Tensor) -> int:
    """How many elements a captured graph computes otherwise, of another input than it was captured with."""
    held, other = x.clone(), x.flip(0)
    layer(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(held)
    held.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return int((captured != layer(other)).sum())


def torchao(place: Place, linear: nn.Linear, x: torch.Tensor, where: str) -> Rows:
    """Its dynamic FP8, row by row, where it is installed."""
    if importlib.util.find_spec("torchao") is None or place.device.type != "cuda":
        return
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization import quantize_ as theirs

    model = nn.Sequential(nn.Linear(*reversed(linear.weight.shape), dtype=torch.bfloat16, device=place.device))
    model.load_state_dict({f"0.{key}": value for key, value in linear.state_dict().items()})
    theirs(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    compiled = torch.compile(model, fullgraph=True)
    yield place.compare(f"torchao FP8, compiled, {where}", partial(compiled, x), "BF16", partial(linear, x), 1.0)


def whole_model(place: Place) -> Rows:
    """A pass of the 14B's transformer, of random weights, at 81 frames of 832x480."""
    shape = (
        {**SHAPES["14b"], "num_layers": 40}
        if not place.small
        else {**SHAPES["1.3b"], "num_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    )
    frames, height, width = (21, 60, 104) if not place.small else (1, 8, 8)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with place.device:
            model = WanTransformer3DModel(**shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    given = {
        "hidden_states": torch.randn(1, 16, frames, height, width, device=place.device).to(torch.bfloat16),
        "timestep": torch.tensor([500.0], device=place.device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=place.device).to(torch.bfloat16),
        "return_dict": False,
    }
    reference, plain = passed(place, model, given)
    quantize_(model, QuantConfig(packed=True))
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    for name, bar in (("fast", 1.08), ("fp8", 0.85)):
        config = QuantConfig(packed=True, product=name)
        if name == "fp8" and "fp8" not in configs(place):
            continue
        for layer in layers:
            layer.scheme = parse(config)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found, took = passed(place, model, given)
        yield Row(f"14B, one pass, packed {name}", "BF16", took, plain, place.bar(bar))
        noise = 10 * torch.log10(reference.square().mean() / (found - reference).square().mean())
        yield Row(f"14B, SQNR of one pass, packed {name}, dB", "1", float(noise), 1.0, None, True)
        if place.device.type == "cuda":
            yield Row(f"14B, peak of a pass, packed {name}", "18 GB", torch.cuda.max_memory_allocated(), 18e9, 1.0)


def passed(place: Place, model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, float]:
    output = model(**given)[0].float()
    place.wait()
    begun = time.perf_counter()
    for _ in range(2):
        model(**given)
    place.wait()
    return output, (time.perf_counter() - begun) / 2


def job(place: Place) -> Rows:
    """The default job on tiny-wan: its generation with HiF8 beside that in BF16."""
    with tempfile.TemporaryDirectory() as folder:
        where = [
            f"hydra.run.dir={folder}/run",
            f"cache={folder}/cache",
            f"model.device={place.device.type}",
            "tracker=none",
        ]
        short = (
            ["model.generation.steps=1", "model.generation.num_frames=5", "model.other_frames=[]"]
            if place.small
            else []
        )
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "wanquant", "ptq", "protect=boundary", *where, *short],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.splitlines()[-1])
        result = json.loads(Path(folder, "run", "result.json").read_text())
        timings = result["timings"]
        yield Row("default job", "49 s", time.perf_counter() - begun, 49.0)
        times = (timings["generate_quantized"], timings["generate_bf16"], place.bar(1.5))
        yield Row("tiny-wan, generation quantized", "BF16", *times)
        yield Row("tiny-wan, SQNR of single steps, dB", "1", result["metrics"]["step_sqnr"]["mean"], 1.0, None, True)


#: Each with the seconds it needs at most on a card of 2023.
PARTS: dict[str, tuple[Callable[[Place], Rows], int]] = {
    "bits": (bits, 90),
    "elementwise": (elementwise, 30),
    "linears": (linears, 120),
    "whole_model": (whole_model, 80),
    "job": (job, 90),
}


def measured(place: Place, names: list[str], budget: float, write: Callable[[list[Row], list[str]], None]) -> list[str]:
    """What failed; ``write`` is called after each part."""
    rows: list[Row] = []
    failed, begun = [], time.perf_counter()
    for name in names:
        part, needs = PARTS[name]
        started = time.perf_counter()
        if started - begun + needs > budget:
            failed.append(f"{name}: not begun, for want of time")
            write(rows, failed)
            continue
        try:
            with torch.no_grad():
                for row in part(place):
                    rows.append(row)
                    print(f"  {row.name}: {row.ratio:.3g} {row.verdict}", file=sys.stderr, flush=True)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        write(rows, failed)
    return failed


def machine(place: Place) -> str:
    packages = ("torch", "triton", "diffusers", "torchao")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    if place.device.type != "cuda":
        return f"{place.device}; {', '.join(versions)}"
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return ", ".join(
        [torch.cuda.get_device_name(), f"compute capability {capability}", f"CUDA {torch.version.cuda}", *versions]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=410.0, help="seconds in all, on a card at full size")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    args = parser.parse_args()
    place, names = Place(torch.device(args.device), args.small), args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {unknown[0]}: choose one of {', '.join(PARTS)}")
    if place.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA card: --device cpu --small tries the program")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    args.out.mkdir(parents=True, exist_ok=True)
    card = "cpu" if place.device.type != "cuda" else torch.cuda.get_device_name().split()[-1].lower()
    path = args.out / f"{datetime.datetime.now():%Y-%m-%d-%H%M}-card-{card}.md"

    title = f"# On {place.device.type}{', small, to try the program' if args.small else ''}"

    def write(rows: list[Row], failed: list[str]) -> None:
        parts = [title, f"`python -m benchmarks.card {' '.join(sys.argv[1:])}`", table(rows), machine(place), *failed]
        path.write_text("\n\n".join(parts) + "\n")

    budget = args.budget if place.bar(1.0) else math.inf
    failed = measured(place, names, budget, write)
    print(f"{path.read_text()}\n{path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
