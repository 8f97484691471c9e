"""A family of models that is registered from outside is loaded as Wan's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import WanPipeline, WanTransformer3DModel

from tests.jobs import short
from wanquant import load_pipeline, quantize_, save_quantized
from wanquant.quant import QuantConfig
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.checkpoints.find import check_shape, shape_of
from wanquant.wan.families import FAMILIES, Family, family_of, register_family


class OtherTransformer(WanTransformer3DModel):
    pass


class OtherPipeline(WanPipeline):
    pass


OTHER = Family(OtherPipeline, OtherTransformer, folds={"attn2.to_q": "norm2"})


@pytest.fixture
def registered() -> Iterator[None]:
    register_family("OtherPipeline", OTHER)
    yield
    del FAMILIES["OtherPipeline"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the other library would save it, from tiny-wan's parts."""
    pipe = load_pipeline(short(2), "cpu")
    pipe.save_pretrained(tmp_path / "other")
    for path, name in (("model_index.json", "OtherPipeline"), ("transformer/config.json", "OtherTransformer")):
        described = json.loads((tmp_path / "other" / path).read_text())
        (tmp_path / "other" / path).write_text(json.dumps({**described, "_class_name": name}))
    return tmp_path / "other"


def test_a_registered_family_is_loaded_quantized_and_saved(registered: None, folder: Path, tmp_path: Path) -> None:
    assert check_shape(folder) is OTHER
    assert isinstance(shape_of(folder / "transformer"), OtherTransformer)
    pipe = load_pipeline(folder, "cpu")
    assert isinstance(pipe, OtherPipeline)
    assert isinstance(pipe.transformer, OtherTransformer)
    quantize_(pipe.transformer, QuantConfig(), (0,))
    again = load_pipeline(save_quantized(pipe, tmp_path / "saved"), "cpu")
    assert isinstance(again, OtherPipeline)
    assert isinstance(again.transformer, OtherTransformer)
    assert len(quantized_linears(again.transformer)) == 10
    assert family_of("OtherTransformer").folds == OTHER.folds
    with pytest.raises(ValueError, match="the model family OtherPipeline is known already"):
        register_family("OtherPipeline", OTHER)


def test_what_no_family_knows_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a OtherPipeline, not a WanPipeline"):
        load_pipeline(folder, "cpu")
    with pytest.raises(ValueError, match="the pipeline class WanPipeline is that of another"):
        register_family("MinePipeline", Family(WanPipeline, OtherTransformer))
    with pytest.raises(ValueError, match="the model family WanPipeline is known already"):
        register_family("WanPipeline", OTHER)
