"""The loop: a function of its steps, whatever happens to the process, and honest about what breaks."""

from __future__ import annotations

import gc
import json
import math
import random
import re
import signal
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import forked
from tests.qat.small import Small, config, loop, quantized
from wanquant.qat.config import make_rate
from wanquant.qat.loop import WINDOW, Hooks, TrainingStopped
from wanquant.qat.state import Average

ROOT = Path(__file__).parents[2]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_anywhere_it_ends_the_same(tmp_path: Path, precision: str) -> None:
    whole = loop(tmp_path / "whole", precision=precision)
    expected = whole.run()
    assert len(expected.rows) == 12
    assert expected.rows[-1]["loss"] < expected.rows[0]["loss"]
    ends = weights(whole.release()), whole.average.values  # type: ignore[union-attr]
    for stops in ((1,), (5,), (7, 9), (11,)) if precision == "fp32" else ((7, 9),):
        for stop in (*stops, None):
            again = loop(tmp_path / str(stops), precision=precision)
            found = again.run(stop_at=stop)
            released = weights(again.release())
        assert found.rows == expected.rows
        assert all(map(torch.equal, released, ends[0]))
        assert all(map(torch.equal, again.average.values, ends[1]))  # type: ignore[union-attr]
        assert [path.name for path in (tmp_path / str(stops)).iterdir()] == ["state-000012"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_released_it_is_as_it_came_and_goes_with_its_holder(tmp_path: Path, precision: str) -> None:
    """And not when Python next looks for cycles, which with few but large objects may be never."""
    made = loop(tmp_path, precision=precision)
    made.run(stop_at=1)
    model = made.release()
    assert "forward" not in vars(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, made
        assert gone() is None
    finally:
        gc.enable()


def small(tmp_path: Path, name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.qat.small", str(tmp_path / name), str(tmp_path / f"{name}.json"), *more]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 20])
def test_killed_it_ends_the_same(kills: int, tmp_path: Path) -> None:
    """By SIGKILL, whenever: also while a state is written."""
    assert forked.run(small(tmp_path, "whole", str(20 * kills + 20))[1:]).returncode == 0
    pick, killed = random.Random(0), 0
    while killed < kills:
        process = forked.start(small(tmp_path, "killed", str(20 * kills + 20))[1:])
        folder = tmp_path / "killed"
        before = {path.name for path in folder.glob("state-*")} if folder.is_dir() else set()
        while process.poll() is None and {path.name for path in folder.glob("state-*")} <= before:
            time.sleep(0.005)
        time.sleep(pick.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        killed += 1
    assert killed == kills
    assert forked.run(small(tmp_path, "killed", str(20 * kills + 20))[1:]).returncode == 0
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed"))
    assert again == whole


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Sums of other halves: float32 rounding apart, which is 1e-5 of the loss after twelve steps."""
    assert forked.run(small(tmp_path, "one")[1:]).returncode == 0
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    both = [forked.start(small(tmp_path, "two")[1:], {**launch, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    errors = [(process.wait(), process.err.read_text()) for process in both]
    assert [status for status, _ in errors] == [0, 0], errors
    done = "".join(error for _, error in errors)
    assert len(list((tmp_path / "two").glob("state-000012/random_states_*"))) == 2
    assert len(re.findall(r"^train", done, re.MULTILINE)) == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-5)


def test_parts_add_up_to_the_batch(tmp_path: Path) -> None:
    ends = []
    for parts in (1, 4):
        made = loop(tmp_path / str(parts), config(accumulation=parts), quantized())
        ends.append([row["loss"] for row in made.run().rows])
        made.release()
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    with pytest.raises(ValueError, match="8 does not divide into 3"):
        loop(tmp_path / "three", config(accumulation=3))


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    loop(tmp_path).run(stop_at=2)
    (tmp_path / "state-000002" / "loop.json").write_text(json.dumps({"recipe": "other"}))
    with pytest.raises(ValueError, match="another recipe: other"):
        loop(tmp_path)


class Breaks(nn.Module):
    """Nothing, but NaN in its output or its gradient, or ever larger, once it is told to."""

    how = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "output":
            return x / 0 * 0
        if self.how == "gradient":  # sqrt at 0 has an infinite one, and 0 times that is NaN
            return x + (x.detach() * 0 + x * 0).sqrt() * 0
        return x * 30 if self.how == "grow" else x


def breaking(how: str, at: int) -> tuple[Small, Hooks]:
    model = Small()
    part = Breaks()
    model.blocks[1].append(part)

    def before(step: int) -> None:
        part.how = how if step >= at else ""

    return model, Hooks(before=before)


def test_what_is_not_finite_is_traced_to_its_layer(tmp_path: Path) -> None:
    for how, where in (
        ("output", r"loss is not finite.*output of blocks\.1\.3"),
        ("gradient", "gradient of blocks.1.2"),
    ):
        model, hooks = breaking(how, 7)
        made = loop(tmp_path / how, config(), model)
        with pytest.raises(
            TrainingStopped, match=f"in step 7, first .*{where}" if how == "gradient" else where
        ) as told:
            made.run(hooks=hooks)
        assert "the state after 5 steps is kept" in str(told.value)
        assert all(value.isfinite().all() for value in weights(model))
        # And goes on from there, with what broke it mended.
        model, hooks = breaking(how, 99)
        again = loop(tmp_path / how, config(), model)
        assert again.done == 5
        assert len(again.run(hooks=hooks).rows) == 12


def test_a_loss_that_grows_is_stopped(tmp_path: Path) -> None:
    model, hooks = breaking("grow", 25)
    made = loop(tmp_path, config(60, diverged=2.0), model)
    with pytest.raises(TrainingStopped, match=r"grows without end.*the gradient of blocks\.\d was the first"):
        made.run(hooks=hooks)
    assert 2 * WINDOW < len(made.curves.rows) < 60


def test_a_warm_up_is_not_what_the_loss_is_compared_with(tmp_path: Path) -> None:
    """Without rounding the loss of a student that is its own teacher is nearly 0."""
    for begin in (0, 15):
        made = loop(tmp_path / str(begin), config(40, begin=begin), Small())
        plain = made.loss

        def loss(model: nn.Module, step: int, rows: range, plain: Any = plain) -> dict[str, torch.Tensor]:
            found = plain(model, step, rows)
            return {name: value * (1e-4 if step < 15 else 1.0) for name, value in found.items()}

        made.loss = loss
        if begin:
            assert len(made.run().rows) == 40
        else:
            with pytest.raises(TrainingStopped, match="grows without end"):
                made.run()
        made.release()


def test_checks_see_the_averaged_weights(tmp_path: Path) -> None:
    made = loop(tmp_path)
    seen: list[bool] = []

    def check(step: int) -> dict[str, float]:
        assert made.average is not None
        seen.append(all(map(torch.equal, weights(made.bare), averages[-1])))
        return {"value": float(step)}

    averages: list[list[torch.Tensor]] = []

    def before(step: int) -> None:
        pass

    original = made.average.in_place  # type: ignore[union-attr]

    def in_place() -> object:
        averages.append([value.clone() for value in made.average.values])  # type: ignore[union-attr]
        return original()

    made.average.in_place = in_place  # type: ignore[union-attr, method-assign, assignment]
    curves = made.run(hooks=Hooks(before=before, check=check, check_every=5))
    assert [row["step"] for row in curves.checks] == [4, 9, 11]
    assert seen == [True] * 3


def test_the_average_by_hand() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = Average([parameter], 0.5, start=1)
    for step, value in enumerate((4.0, 8.0, 0.0)):
        parameter.data.fill_(value)
        average.update(step)
    # Step 0 copies; then with decays 2/11 and 3/12.
    first = 4 * 2 / 11 + 8 * 9 / 11
    assert average.values[0].item() == pytest.approx(first * 3 / 12)
    with average.in_place():
        assert parameter.item() == pytest.approx(first * 3 / 12)
    assert parameter.item() == 0.0


def test_rates() -> None:
    cosine = make_rate("cosine", 12, warmup=2, floor=0.1)
    assert [cosine(step) for step in (0, 1, 2, 11)] == pytest.approx([0.5, 1.0, 1.0, 0.1])
    assert cosine(6) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 9)))
    linear = make_rate("linear", 11)
    assert [linear(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    after = make_rate("constant", 20, warmup=2, begin=5)
    assert [after(step) for step in (4, 5, 6, 19)] == [1.0, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="choose constant"):
        make_rate("steps", 3)
