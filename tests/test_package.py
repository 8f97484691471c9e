"""The package itself: what importing it costs and assumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import wanquant
from wanquant.evaluate.judges import vbench
from wanquant.runs.signature import installed


def imported_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_formats_and_quant_need_no_diffusers() -> None:
    loaded = imported_by("from wanquant.formats import hif8; from wanquant import quantize_")
    assert not loaded & {"diffusers", "transformers", "hydra", "wandb", "torch_npu"}


def test_the_public_names_are_there() -> None:
    assert all(callable(getattr(wanquant, name)) for name in wanquant.__all__)


def test_vbenchs_version_is_one() -> None:
    root = Path(wanquant.__file__).parent.parent
    assert f"--no-deps vbench=={vbench.VERSION} pyiqa=={vbench.PYIQA}\n" in (root / "Makefile").read_text()
    assert vbench.INSTALL in (root / "README.md").read_text()
    assert installed("vbench") == vbench.VERSION


def test_backend_autoload_is_off_before_torch_is_imported() -> None:
    """Where torch_npu is installed without CANN, torch's own autoload would fail the import."""
    code = "import wanquant, os, sys; print('torch' in sys.modules, os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]
