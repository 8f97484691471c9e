"""Shared by all tests: no network, one seed, and small real Wan transformers."""

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
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

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

#: As jobs are by default; tests run side by side.
torch.set_num_threads(1)
#: As jobs do: what was imported is not looked through for cycles again and again.
gc.freeze()
#: What keeps libraries from the network here, and is not set where a user works.
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")


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
def seeded() -> None:
    torch.manual_seed(0)


def wan_transformer(blocks: int = 4, dtype: torch.dtype = torch.bfloat16) -> WanTransformer3DModel:
    """A real Wan transformer, 48 wide, with random weights; the model's float32 modules stay so in BF16."""
    model = WanTransformer3DModel(
        num_layers=blocks, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, text_dim=32, freq_dim=64
    ).eval()
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def wan_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32).to(dtype),
    }
