"""The programs on a transformer in another layout than diffusers', the rest of its pipeline from ``model.base``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import CACHE, QUICK, TWO, ptq, run, short
from tests.wan.layouts import authors_config, in_fp8, is_linear, renamed, write_file, write_folder
from wanquant import load_pipeline
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears
from wanquant.wan.checkpoints.stored import Stored
from wanquant.wan.load import read_transformer


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return renamed(read_transformer(short() / "transformer"), "model.diffusion_model.")


def codes(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "transformer" / WEIGHTS)


@pytest.mark.slow
def test_the_main_job_on_an_fp8_file(
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_file(in_fp8(tensors), tmp_path / "wan_fp8_scaled.safetensors")
    words = [
        f"model.path={path}",
        f"model.base={short()}",
        "tracker=none",
        "prompts.seeds=[0]",
        "eval.noise_floor=false",
    ]
    assert ptq(monkeypatch, *words, *QUICK, TWO, f"hydra.run.dir={tmp_path / 'run'}") == 0
    linears = sum(map(is_linear, tensors))
    said = capsys.readouterr()
    assert f"{path}: of {len(tensors)} tensors {linears} float8_e4m3fn with scales, dequantized to BF16" in said.err
    result = read_result(tmp_path / "run")
    assert result["model"]["name"] == path.name
    assert result["model"]["source"]["transformer"]["dequantized"] == {"float8_e4m3fn with scales": linears}
    assert result["conversion"]["converted"] == 30
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"weights came quantized ({linears} float8_e4m3fn with scales)" in page
    made = load_pipeline(tmp_path / "run" / "checkpoint", device="cpu")
    assert len(quantized_linears(made.transformer)) == 30
    # Streamed from the file, it is the same checkpoint.
    convert = ["mode=convert", *words[:3], f"hydra.run.dir={tmp_path / 'converted'}"]
    assert ptq(monkeypatch, *convert) == 0
    assert "dequantized to BF16" in capsys.readouterr().err
    a, b = codes(tmp_path / "converted"), codes(tmp_path / "run")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "converted" / "checkpoint" / "vae" / "config.json").is_file()
    assert read_result(tmp_path / "converted")["model"]["source"] == result["model"]["source"]


def test_a_file_is_converted_alone_too(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_transformer(short() / "transformer")
    folder = write_folder(whole, tmp_path / "theirs", authors_config(whole))
    words = ["mode=convert", "tracker=none", f"cache={tmp_path / 'cache'}"]
    for name, path in (("file", folder / WEIGHTS), ("folder", folder), ("pipeline", short())):
        where = [f"model.path={path}", f"convert.to={tmp_path / name}", f"hydra.run.dir={tmp_path / f'run {name}'}"]
        assert ptq(monkeypatch, *words, *where) == 0
    found = [load_file(tmp_path / name / WEIGHTS) for name in ("file", "folder", "pipeline/transformer")]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("program", ["ptq", pytest.param("train", marks=pytest.mark.slow), "eval"])
def test_a_dry_run_reads_no_weights(
    program: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(stored: Stored) -> torch.Tensor:
        raise AssertionError(f"{stored.name} was read")

    monkeypatch.setattr(Stored, "read", read)
    path = write_file(tensors, tmp_path / "wan.safetensors")
    words = [f"model.path={path}", f"model.base={short()}", "dry_run=true", f"cache={CACHE}", *QUICK]
    assert run(monkeypatch, program, *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert "memory" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["ptq", "train", "eval"])
def test_what_is_wrong_is_one_line(
    program: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacking = {name: t for name, t in tensors.items() if not name.endswith("blocks.3.ffn.0.weight")}
    path = write_file(
        {**lacking, "model.diffusion_model.img_emb.proj.0.bias": torch.ones(1)}, tmp_path / "w.safetensors"
    )
    for words, said in (
        ([], "give the rest of its pipeline"),
        (
            [f"model.base={short()}"],
            "tensor model.diffusion_model.blocks.3.ffn.0.weight is missing (1 in all); "
            "tensor model.diffusion_model.img_emb.proj.0.bias is unknown (1 in all)",
        ),
    ):
        given = [f"model.path={path}", *words, "tracker=none", f"cache={CACHE}", *QUICK]
        assert run(monkeypatch, program, *given, f"hydra.run.dir={tmp_path / 'run'}") != 0
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert said in lines[-1]
