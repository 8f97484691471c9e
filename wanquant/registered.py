"""Makes diffusers know our checkpoints: ``from_pretrained`` loads them once wanquant is imported, in whatever order.

diffusers keeps its quantizers in two dictionaries. Ours are entered when diffusers is there, now or later, and import
nothing until a checkpoint asks for them, so that ``import wanquant`` stays light.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "wanquant"
HOME, WATCHED = "wanquant.wan.checkpoints.quantizer", "diffusers.quantizers.auto"
GUARD, MODELS = "wanquant.wan.checkpoints.guard", "diffusers.models.modeling_utils"


class _Config:
    """Stands for ``WanquantConfig``."""

    @staticmethod
    def from_dict(described: dict[str, Any]) -> Any:
        return importlib.import_module(HOME).WanquantConfig(**described)


def _quantizer(config: Any, **how: Any) -> Any:
    return importlib.import_module(HOME).WanquantQuantizer(config, **how)


def _enter(auto: ModuleType) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


class _Watch(MetaPathFinder):
    """Waits for the module that holds the dictionaries."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            loader.exec_module = exec_module
        return spec


def register() -> None:
    if WATCHED in sys.modules:
        _enter(sys.modules[WATCHED])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def guard(module: Any) -> None:
    """Has a model of diffusers, or two as one, refuse what would lose a scale."""
    if MODELS in sys.modules:
        for part in getattr(module, "parts", (module,)):
            if isinstance(part, sys.modules[MODELS].ModelMixin):
                importlib.import_module(GUARD).guard_(part)
