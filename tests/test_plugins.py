"""A plug-in adds a format, a scale rule, a protection rule, a metric and a model family from outside the package."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from diffusers import WanPipeline

from tests import forked
from tests.jobs import QUICK, TWO, short
from wanquant.plugins import _load, load_plugins
from wanquant.runs.run import read_result

PLUGIN = '''
from dataclasses import replace

import torch
from diffusers import WanPipeline

from wanquant.evaluate.compare import register_metric
from wanquant.formats.base import Format
from wanquant.formats.registry import register_format
from wanquant.ptq.protect import register_protection
from wanquant.quant.scale import register_scale_rule
from wanquant.wan.families import WAN, register_family


class Int4(Format):
    """Whole numbers from -7 to 7, a code a byte."""

    name, overflow, target, codes_all = "mine_int4", 7.5, 7.0, False

    def round(self, x, overflow):
        return x.round().clamp(-7, 7) + 0.0

    def encode(self, x, overflow):
        return self.round(x, overflow).to(torch.int8).view(torch.uint8)

    def decode(self, codes, dtype=torch.bfloat16):
        return codes.view(torch.int8).to(dtype)


class MyPipeline(WanPipeline):
    """As another family would have a class of its own."""


def twice(target):
    return lambda absmax: torch.where(absmax > 0, 2 * absmax / target, 1.0)


def every_third(config, blocks):
    return list(range(0, blocks, 3))


def brightness(reference, sample):
    return float(sample.video.mean() - reference.video.mean())


register_format(Int4())
register_scale_rule("mine_twice", twice)
register_protection("mine_third", rule=every_third)
register_metric("mine_brightness", brightness, "brightness", "")
register_family("MyPipeline", replace(WAN, pipeline=MyPipeline))
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that has it."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    return {"WANQUANT_PLUGINS": "mine"}


def _on_path(folder: str) -> None:
    """In a process that was forked, for which ``PYTHONPATH`` comes too late."""
    sys.path.insert(0, folder)


def test_it_adds_one_of_each(plugin: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    WanPipeline.from_pretrained(short()).save_pretrained(model)
    index = model / "model_index.json"
    index.write_text(index.read_text().replace('"WanPipeline"', '"MyPipeline"'))
    words = [
        "ptq.py",
        "quant.format=mine_int4",
        "quant.activations.rule=mine_twice/7",
        "protect=none",
        "protect.by=mine_third",
        f"model.path={model}",
        f"cache={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "tracker=none",
        TWO,
        *QUICK,
    ]
    done = forked.run(words, plugin, partial(_on_path, str(tmp_path)))
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "run")
    assert result["quant"]["format"] == "mine_int4"
    assert result["quant"]["activations"]["rule"] == "mine_twice/7"
    assert result["protect"]["blocks"] == [0, 3, 6]
    assert result["conversion"]["converted"] == 50
    assert result["metrics"]["mine_brightness"]["n"] == 2
    assert "brightness" in (tmp_path / "run" / "report.html").read_text()


def test_without_it_the_names_are_not_known(tmp_path: Path) -> None:
    done = forked.run(["ptq.py", "protect=none", "protect.by=mine_third", f"hydra.run.dir={tmp_path / 'run'}"])
    assert done.returncode == 1
    assert "protect.by=mine_third: choose list, middle, random" in done.stderr


def test_one_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANQUANT_PLUGINS", "no_such_plugin")
    _load.cache_clear()
    with pytest.raises(ValueError, match="no_such_plugin cannot be imported"):
        load_plugins()
    _load.cache_clear()
