"""``mode=convert`` end to end: what it makes is what a run makes, and a conversion that was killed goes on."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests import forked
from tests.jobs import QUICK, TWO, ptq, short
from tests.wan.pair import make_pair
from tests.wan.test_names import original_names
from wanquant import load_pipeline
from wanquant.runs.run import read_result
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import WEIGHTS, quantized_linears
from wanquant.wan.checkpoints.model_files import fingerprint
from wanquant.wan.checkpoints.sums import check_sums
from wanquant.wan.experts import shape_of_whole

TINY = tiny.folder()


def tensors(folder: Path, name: str = "transformer") -> dict[str, torch.Tensor]:
    return {k: t for path in sorted((folder / name).glob("*.safetensors")) for k, t in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_checkpoint_a_run_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tracker=none", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, "mode=convert", *words, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    said = capsys.readouterr().out
    assert "30 linears converted, 50 linears protected, 6 linears skipped" in said
    run = [f"hydra.run.dir={tmp_path / 'run'}", *QUICK, TWO, "eval.noise_floor=false", "prompts.seeds=[0]"]
    assert ptq(monkeypatch, *words, *run) == 0
    found, wanted = (tmp_path / name / "checkpoint" for name in ("converted", "run"))
    assert same(tensors(found), tensors(wanted))
    layers = quantized_linears(load_pipeline(found, device="cpu").transformer)
    assert len(layers) == 30
    assert all(layer.is_packed for layer in layers.values())
    result = read_result(tmp_path / "converted")
    assert result["convert"]["read_bytes"] == sum(t.nbytes for t in tensors(short()).values())
    assert result["convert"]["written_bytes"] == sum(t.nbytes for t in tensors(found).values())
    assert result["convert"]["written_bytes"] == pytest.approx(result["convert"]["planned_bytes"], rel=1e-3)
    assert result["conversion"] == {"converted": 30, "protected": 50, "skipped": 6}
    assert result["protect"]["blocks"] == [0, 1, 5, 6, 7]
    page = (tmp_path / "converted" / "report.html").read_text()
    assert "Nothing was generated" in page
    assert f"{result['convert']['written_bytes'] / result['convert']['read_bytes']:.3f}" in page
    # It is not done twice, and what is there is not written over.
    assert ptq(monkeypatch, "mode=convert", *words, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    assert "finished already" in capsys.readouterr().out
    # Unless it is this very conversion that made it, whichever run that was.
    for run, said in (("a", "converted,"), ("b", "finished already")):
        where = [f"convert.to={tmp_path / 'there'}", f"hydra.run.dir={tmp_path / run}"]
        assert ptq(monkeypatch, "mode=convert", *words, *where) == 0
        assert said in capsys.readouterr().out
    assert ptq(monkeypatch, "mode=convert", "protect=none", *words, *where) == 1
    assert "is there already" in capsys.readouterr().err


def test_it_is_known_by_what_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by when they were written or where they lie; and what it leaves is not kept where it ended in an error."""
    model = shutil.copytree(short(4), tmp_path / "model")
    words = ["mode=convert", "protect=none", "tracker=none", f"cache={tmp_path / 'cache'}"]
    words += [f"convert.to={tmp_path / 'there'}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert ptq(monkeypatch, *words, f"model.path={model}") == 0
    first = read_result(tmp_path / "run")
    for path in model.rglob("*"):
        os.utime(path, ns=(1, 1))
    moved = shutil.move(model, tmp_path / "moved")
    assert ptq(monkeypatch, *words, f"model.path={moved}") == 0
    assert "finished already" in capsys.readouterr().out
    # Other weights of the same name, size and time.
    path = tmp_path / "moved" / "transformer" / WEIGHTS
    stat = path.stat()
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert ptq(monkeypatch, *words, f"model.path={moved}") == 1
    assert "is there already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "there")
    assert ptq(monkeypatch, *words, f"model.path={moved}") == 0
    second = read_result(tmp_path / "run")
    assert first["model"]["fingerprint"] != second["model"]["fingerprint"] == fingerprint(moved)
    load_pipeline(tmp_path / "there", device="cpu")
    # What ends in an error leaves nothing behind, and its one line names the file and the tensor.
    tensors = load_file(path)
    tensors["blocks.2.ffn.net.2.weight"][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "there")
    assert ptq(monkeypatch, *words, f"model.path={moved}") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: tensor blocks.2.ffn.net.2.weight holds 1 NaN or infinite value of ")
    assert not list(tmp_path.glob("there*"))


def test_a_full_disk_leaves_no_checkpoint_and_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["mode=convert", "protect=none", "tracker=none", f"cache={tmp_path / 'cache'}", f"model.path={short(4)}"]
    words += [f"convert.to={tmp_path / 'there'}", f"hydra.run.dir={tmp_path / 'run'}"]
    short()  # which the helper asks for: not to be made under the limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert ptq(monkeypatch, *words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "File too large" in error
    assert not (tmp_path / "there").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert ptq(monkeypatch, *words) == 0
    assert not list(tmp_path.glob("there.*"))
    check_sums(tmp_path / "there")


@pytest.mark.slow
def test_statistics_come_from_an_analysis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tracker=none", f"cache={tmp_path / 'cache'}", "calib.texts=[a red circle moving up on a gray background]"]
    words += ["calib.seeds=[0]"]
    convert = ["mode=convert", "quant=static_per_tensor", *words]
    assert ptq(monkeypatch, *convert, f"hydra.run.dir={tmp_path / 'x'}") == 1
    assert "needs calibration statistics: run mode=analyze" in capsys.readouterr().err
    assert ptq(monkeypatch, "mode=analyze", *words, *QUICK, f"hydra.run.dir={tmp_path / 'analysis'}") == 0
    convert += [f"convert.statistics={tmp_path / 'analysis'}", f"convert.to={tmp_path / 'made'}"]
    assert ptq(monkeypatch, *convert, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    run = [f"hydra.run.dir={tmp_path / 'run'}", *QUICK, TWO, "eval.noise_floor=false", "prompts.seeds=[0]"]
    assert ptq(monkeypatch, "quant=static_per_tensor", *words, *run) == 0
    assert same(tensors(tmp_path / "made"), tensors(tmp_path / "run" / "checkpoint"))
    assert not (tmp_path / "converted" / "checkpoint").exists()
    assert not list(tmp_path.glob("made.*"))
    assert ptq(monkeypatch, *convert, f"hydra.run.dir={tmp_path / 'converted'}") == 0
    assert "finished already" in capsys.readouterr().out


def test_both_transformers_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pair(tmp_path / "model", [0, 1], [2, 3])
    words = ["mode=convert", "protect=none", f"model.path={model}", "tracker=none", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    found = tmp_path / "run" / "checkpoint"
    assert read_result(tmp_path / "run")["conversion"]["converted"] == 40
    for name in ("transformer", "transformer_2"):
        kinds = {tensor.dtype for key, tensor in tensors(found, name).items() if key.endswith("ffn.net.2.weight")}
        assert kinds == {torch.uint8}
    assert not same(tensors(found), tensors(found, "transformer_2"))


@pytest.mark.slow
def test_a_transformer_alone_and_under_its_authors_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized, or only renamed, which makes of their checkpoint one that diffusers reads."""
    names, described = (
        original_names(shape_of_whole(TINY)),
        json.loads((TINY / "transformer/config.json").read_text()),
    )
    theirs = {"_class_name": "WanModel", "dim": 128, "num_heads": 8, "num_layers": 40, "text_dim": 128}
    theirs |= {key: described[key] for key in ("ffn_dim", "freq_dim")}
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(theirs))
    save_file({names[name]: tensor for name, tensor in tensors(TINY).items()}, folder / WEIGHTS)
    words = ["mode=convert", f"model.path={folder}", "tracker=none", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, *words, f"hydra.run.dir={tmp_path / 'run'}", f"convert.to={tmp_path / 'made'}") == 0
    made = WanTransformer3DModel.from_pretrained(tmp_path / "made")
    assert len(quantized_linears(made)) == 350
    assert (
        ptq(monkeypatch, *words, "quant=bf16", f"hydra.run.dir={tmp_path / 'x'}", f"convert.to={tmp_path / 'ours'}")
        == 0
    )
    ours = WanTransformer3DModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert same(dict(ours.state_dict()), dict(load_pipeline(TINY, device="cpu").transformer.state_dict()))


def test_a_dry_run_says_what_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the JSON files alone."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert ptq(monkeypatch, "mode=convert", "dry_run=true", f"model.path={model}", f"cache={tmp_path / 'cache'}") == 0
    said = capsys.readouterr().out
    assert "PP" + "q" * 35 + "PPP" in said
    assert re.search(r"2\d\.\d MB read, 12\.9 MB written to 1 files, 0\.[56]", said)
    assert "memory" in said
    assert "rounding      weights hif8, per_channel, amax/15; inputs hif8, per_token, amax/15, dynamic\n" in said
    assert re.search(r"^time +[\d.]+ (s|min), by a probe", said, re.MULTILINE)
    assert not list(Path(model).rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_it_goes_on(kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, in files of a block or two."""
    small = "import wanquant.wan.checkpoints.stream as stream; stream.SHARD = 600_000; import runpy; "
    small += "runpy.run_path('ptq.py', run_name='__main__')"
    asked = ["mode=convert", "model=tiny", "tracker=none", f"cache={tmp_path / 'cache'}"]
    folder, pick, killed = tmp_path / "cache" / "converting", random.Random(0), 0
    while killed < kills:
        words = [*asked, f"hydra.run.dir={tmp_path / f'killed{killed}'}"]
        process = forked.start(["-c", small, *words])
        known = len(list(folder.rglob("*.safetensors")))
        while process.poll() is None and len(list(folder.rglob("*.safetensors"))) <= known:
            time.sleep(0.01)
        time.sleep(pick.random() * 0.03)  # all of it takes a quarter of a second
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed += 1
    left = len(list(folder.rglob("*.safetensors")))
    assert left > 0
    times = {path.name: path.stat().st_mtime_ns for path in folder.rglob("diffusion*.safetensors")}
    words = [*asked, f"hydra.run.dir={tmp_path / 'run'}"]
    assert forked.run(["-c", small, *words]).returncode == 0
    assert ptq(monkeypatch, *asked[:3], f"cache={tmp_path / 'other'}", f"hydra.run.dir={tmp_path / 'whole'}") == 0
    made = tmp_path / "run" / "checkpoint"
    assert same(tensors(made), tensors(tmp_path / "whole" / "checkpoint"))
    kept: Any = [made / "transformer" / name for name, changed in times.items()]
    assert sum(path.stat().st_mtime_ns == times[path.name] for path in kept) >= left - 1
    assert {path.suffix for path in folder.iterdir()} == {".lock", ".json"}
