"""Shared by all tests: no network, and one seed."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    DO_NOT_TRACK="1",
)

import atexit
import gc
import importlib.util
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Weights of judges are those a test puts there; VBench reads the first when it is imported.
JUDGES = tempfile.mkdtemp(prefix="wanquant-judges-")
atexit.register(shutil.rmtree, JUDGES, ignore_errors=True)
os.environ.update(VBENCH_CACHE_DIR=f"{JUDGES}/vbench", TORCH_HOME=f"{JUDGES}/torch")


class Hidden:
    """As where decord has no wheel: not to be found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "decord":
            raise ModuleNotFoundError(name)


if os.environ.get("WANQUANT_TEST_WITHOUT_DECORD"):
    sys.meta_path.insert(0, Hidden())

#: Whether there is a real one: what is in ``sys.modules`` may be the reader that stands in.
DECORD = importlib.util.find_spec("decord") is not None if not os.environ.get("WANQUANT_TEST_WITHOUT_DECORD") else False

#: What keeps libraries from the network here, and is not set where a user works.
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """The modules are imported without a search for cycles, as jobs import theirs."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """In the processes that run tests; the one that hands them out imports nothing."""
    import torch

    torch.set_num_threads(1)  # as jobs are by default; tests run side by side
    gc.freeze()  # as jobs do: what was imported is not looked through for cycles again and again


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reaches for the network fails loudly. Local sockets (W&B's own service) stay open."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"):
            return connect(self, address)
        raise AssertionError(f"a test reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """``torch.compile`` gives up on a function that it has compiled eight times over, in other tests too."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's probes of time run what they time once, where its length does not matter."""
    if timing := sys.modules.get("wanquant.wan.resources.timing"):
        monkeypatch.setattr(timing, "LONG_ENOUGH", 1e-9)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)
