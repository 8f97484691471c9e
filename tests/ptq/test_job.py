"""The whole job end to end: once on all of tiny-wan, else on eight of its blocks; and what bad input gets."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests import forked
from tests.conftest import OFFLINE
from tests.jobs import QUICK, ROOT, TWO, TWO_STEPS, ptq, short
from wanquant import load_pipeline
from wanquant.evaluate.fidelity import latent_sqnr
from wanquant.runs.run import read_result
from wanquant.wan import tiny
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import generate
from wanquant.wan.load import Pipeline


def without_network() -> tuple[list[str], dict[str, str]]:
    """A prefix that leaves a command the loopback only, and a user's environment: no library told to stay offline.

    Where the system forbids it, no prefix and the variables.
    """
    prefix = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [], dict(os.environ)
    return prefix, {name: value for name, value in os.environ.items() if name not in OFFLINE}


def recorded(result: dict[str, Any]) -> list[float]:
    return [item["value"] for item in result["metrics"]["latent_sqnr"]["per_item"]]


def measured_again(result: dict[str, Any], quantized: Pipeline, of: str | Path) -> list[float]:
    """The run's latent SQNRs with this pipeline beside the one it was made ``of``."""
    items = result["metrics"]["latent_sqnr"]["per_item"]
    pairs, settings = [(item["prompt"], item["seed"]) for item in items], GenerationConfig(**result["generation"])
    reference, samples = (
        generate(pipe, pairs, settings, decode=False, batch=result["model"]["batch"])
        for pipe in (load_pipeline(of, device="cpu"), quantized)
    )
    return [latent_sqnr(r.latents, s.latents) for r, s in zip(reference, samples, strict=True)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default job, as a user runs it, in a process of its own that can reach no network."""
    folder = tmp_path_factory.mktemp("run")
    prefix, environment = without_network()
    command = [
        *prefix,
        sys.executable,
        "ptq.py",
        "protect=boundary",
        TWO,
        "model.device=cpu",
        *TWO_STEPS[:2],
        "model.other_frames=[]",
    ]
    command.append(f"hydra.run.dir={folder}")
    command.append(f"cache={tmp_path_factory.mktemp('cache')}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    stages = ["read", "load", "calibrate", "quantize", "compare", "save"]
    for stage in (*stages, "generate BF16", "noise floor", "generate hif8"):
        assert stage in done.stderr
    assert "left" in done.stderr
    return folder


def test_result(finished: Path) -> None:
    result = read_result(finished)
    assert (result["status"], result["job"], result["error"]) == ("ok", "ptq", None)
    assert result["conversion"] == {"converted": 350, "protected": 50, "skipped": 6}
    assert result["protect"]["blocks"] == [0, 1, 37, 38, 39]
    assert result["bits_per_weight"] == 8 + 32 * 1664 / 2**18  # of a block: 1664 rows, each with a float32 scale
    assert 0.8 < result["protect"]["fraction_of_flops_quantized"] < 0.9
    assert result["model"]["blocks"] == 40
    for name in ("latent_sqnr", "psnr", "ssim", "floor_ulp.psnr", "shape", "bf16.shape", "difference.shape"):
        metric = result["metrics"][name]
        assert metric["n"] == len(metric["per_item"]) == 2
        assert metric["ci95"][0] <= metric["mean"] <= metric["ci95"][1]
    assert 10 < result["metrics"]["latent_sqnr"]["mean"] < 60
    assert {"finite", "black", "constant", "static", "color_shift", "noise", "bf16.black"} <= set(result["gates"])
    assert result["verdict"] == "pass"
    assert {side: of["elements"] for side, of in result["overflow"].items()} == {"inputs": 0, "weights": 0}
    assert result["metrics"]["floor_seed.psnr"]["mean"] < result["metrics"]["psnr"]["mean"]
    assert result["demonstration"] is True
    assert len(result["signature"]) == 64
    assert result["provenance"]["threads"] == 1
    assert len(result["calibration"]["block_absmax"]) == 40
    assert sum(result["timings"].values()) > 0


def test_files(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    assert html.count("<video") == 2
    assert html.count("<svg") == 3
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "https://" not in html.replace("https://matplotlib.org", "")
    for kind in ("bf16", "quantized"):
        for path in sorted((finished / "videos" / kind).iterdir()):
            frames = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
            assert np.stack(frames).shape == (5, 64, 64, 3)
    assert len(list((finished / "videos" / "side_by_side").glob("*.mp4"))) == 2
    assert Image.open(finished / "figures" / "contact_sheet.png").width > 400
    assert (finished / "config.yaml").read_text().startswith("# A wanquant run")
    assert list(finished.glob("wandb/offline-run-*/*.wandb"))
    assert not [path for path in finished.rglob("*") if path.suffix in (".tmp", ".partial")]


def test_the_saved_checkpoint_makes_the_same_videos(finished: Path) -> None:
    result = read_result(finished)
    assert measured_again(result, load_pipeline(finished / "checkpoint", device="cpu"), "tiny") == recorded(result)


def test_dry_run_only_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(monkeypatch, "model=tiny", *QUICK, "dry_run=true", f"hydra.run.dir={tmp_path / 'run'}") == 0
    printed, progress = capsys.readouterr()
    assert "Loading" not in progress, "the bars of libraries"
    assert "PP" + "q" * 35 + "PPP" in printed
    assert "rounding    weights hif8, per_channel, amax/15; inputs hif8, per_token, amax/15, dynamic" in printed
    assert "350 converted, 50 protected, 6 skipped" in printed
    # Two for calibration; five each of BF16, noise perturbed, another seed, quantized.
    assert "17 videos denoised in BF16, 5 quantized, 20 decoded" in printed
    assert re.search(r"^memory +[\d.]+ [MG]B: weights 28.\d MB, activations .*, the program itself", printed, re.M)
    assert re.search(r"^time +[\d.]+ (s|min): ", printed, re.M)
    assert not (tmp_path / "run").exists()


def test_every_long_stage_is_predicted(finished: Path) -> None:
    """Loosely, since others may use the machine: what would be found is a kind of work that is not counted."""
    result = read_result(finished)
    stages = result["planned"]["stages"]
    assert result["planned"]["seconds"] == pytest.approx(sum(stages.values()))
    long = {name for name, taken in result["timings"].items() if taken > 0.5} - {"plan", "total"}
    assert {"calibrate", "noise_floor"} & long
    for name in long:
        # Of a busy machine nothing is known but that the stage was thought of.
        factor = 30 if result["planned"]["guess"] else 3
        assert result["timings"][name] / factor < stages[name] < factor * result["timings"][name], name


@pytest.mark.slow
def test_predicted_stands_beside_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two quantizations that differ in nothing but how they are kept, each its own."""
    words = [TWO, "tracker=none", "eval.noise_floor=false", "prompts.seeds=[0]", f"cache={tmp_path / 'cache'}"]
    planned = []
    for packed in ("false", "true"):
        folder = tmp_path / packed
        assert ptq(monkeypatch, *words, f"quant.packed={packed}", f"hydra.run.dir={folder}", "force=true") == 0
        memory = read_result(folder)["memory"]
        assert memory["planned_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.3)
        assert read_result(folder)["planned"]["seconds"] > 0
        assert "Predicted, with nothing in the cache" in (folder / "report.html").read_text()
        planned.append(memory["planned_bytes"] - memory["begun_bytes"])
    assert planned[0] > planned[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["protect=auto", "protect.by=sensitivity"],
            "19 videos denoised in BF16, 5 quantized, 20 decoded, single steps of 47 ",
        ),
        (
            ["protect=greedy", "protect.candidates=6"],
            "19 videos denoised in BF16, 5 quantized, 20 decoded, single steps of 67 ",
        ),
        (
            ["protect=greedy", "protect.candidates=0", "protect.budget=1"],
            "5 quantized, 20 decoded, single steps of 47 ",
        ),
        (["mode=analyze"], "4 videos denoised in BF16, 2 quantized, 0 decoded, by a probe"),
        (["eval.videos=false"], "7 videos denoised in BF16, 0 quantized, 0 decoded, single steps of 7 "),
        (["mode=analyze", "protect=auto", "protect.by=block_sqnr"], "4 videos denoised in BF16, 2 quantized, 0"),
        (
            ["mode=analyze", "analysis.sensitivity=true"],
            "6 videos denoised in BF16, 2 quantized, 0 decoded, single steps of 50 ",
        ),
    ],
)
def test_a_dry_run_counts_what_choosing_costs(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ptq(monkeypatch, "model=tiny", "dry_run=true", *words) == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_static_activations_go_from_calibration_into_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And a refused run in the same directory puts the result of the former aside."""
    where = f"hydra.run.dir={tmp_path}"
    status = ptq(
        monkeypatch, "quant=static_per_tensor", "quant.overflow=saturate", TWO,
        "tracker=none", "eval.noise_floor=false", where,
    )  # fmt: skip
    assert status == 0
    result = read_result(tmp_path)
    assert result["quant"]["name"] == "static_per_tensor overflow=saturate"
    pipe = load_pipeline(tmp_path / "checkpoint", device="cpu")
    layers = quantized_linears(pipe.transformer)
    assert len(layers) == 30
    for name, layer in layers.items():
        assert layer.input_scale is not None
        assert layer.input_scale.item() == torch.tensor(result["calibration"]["input_absmax"][name] / 15).item()
        assert layer.scheme.overflow == "saturate"
    assert measured_again(result, pipe, short()) == recorded(result)

    for refused in ("protect.blocks=[40]", truncated_model(tmp_path_factory.mktemp("truncated"))):
        assert ptq(monkeypatch, refused, where) == 1
        assert not (tmp_path / "result.json").exists()
        assert (tmp_path / "report.previous.html").is_file()
        (tmp_path / "result.previous.json").rename(tmp_path / "result.json")
        assert read_result(tmp_path) == result
    assert (tmp_path / "checkpoint").is_dir()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["quant=mxfp8_w8a8", "quant.packed=true"], id="mxfp8 packed"),
        pytest.param(["quant=int8_w8a8", "quant.attention=qkvp"], id="int8 with attention", marks=pytest.mark.slow),
    ],
)
def test_other_formats_make_the_same_videos_from_their_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str]
) -> None:
    status = ptq(
        monkeypatch, *overrides, TWO, "tracker=none", "eval.noise_floor=false",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert status == 0
    result = read_result(tmp_path)
    assert measured_again(result, load_pipeline(tmp_path / "checkpoint", "cpu"), short()) == recorded(result)


def test_values_that_fp8_loses_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its checkpoint is HiF8's, which loads for any product."""
    words = ["quant=hif8_fp8", "protect=none", TWO, "tracker=none", f"hydra.run.dir={tmp_path / 'run'}"]
    assert ptq(monkeypatch, *words) == 0
    result = read_result(tmp_path / "run")
    assert result["conversion"] == {"converted": 80, "protected": 0, "skipped": 6}
    lost = result["lost_to_fp8"]
    assert f"<b>{100 * lost['inputs_share']:.3f} %</b>" in (tmp_path / "run" / "report.html").read_text()
    assert f"lost to FP8: {100 * lost['inputs_share']:.3f} %" in capsys.readouterr().out
    assert 0 < lost["inputs_share"] < 0.05
    assert 0 < lost["weights_share"] < 0.05
    assert lost["inputs"] > lost["weights"] > 0
    assert {side: of["elements"] for side, of in result["overflow"].items()} == {"inputs": 0, "weights": 0}
    layers = [
        quantized_linears(load_pipeline(tmp_path / "run" / "checkpoint", device="cpu", **how).transformer)
        for how in ({}, {"product": "fast"}, {"packed": True})
    ]
    assert sum(layer.lost_weights() for layer in layers[0].values()) == lost["weights"]
    for name, layer in layers[0].items():
        assert all(torch.equal(layer.codes(), each[name].codes()) for each in layers[1:])
        assert layers[1][name].weight.dtype == torch.bfloat16


def test_a_second_run_makes_no_bf16_video_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for name, force in (("first", "false"), ("second", "true")):
        overrides = [TWO, "eval.noise_floor=true", "tracker=none", "checkpoint=false", f"cache={tmp_path / 'cache'}"]
        assert ptq(monkeypatch, *overrides, f"hydra.run.dir={tmp_path / name}", f"force={force}") == 0
        results.append(read_result(tmp_path / name))
    made = ["calibrate", "record BF16", "generate BF16", "noise floor: 1 ulp", "noise floor: seed"]
    assert [result["provenance"]["from_cache"] for result in results] == [[], made]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["signature"] == results[1]["signature"]
    assert f"generate BF16        known, from {tmp_path / 'cache'}" in capsys.readouterr().err
    assert "Found in the cache" in (tmp_path / "second" / "report.html").read_text()


def test_what_is_finished_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also not in another folder, nor under another name for the same blocks; but with a checkpoint, if there was
    none."""
    base = [TWO, "tracker=none", "eval.noise_floor=false", f"cache={tmp_path / 'cache'}"]
    assert ptq(monkeypatch, *base, "checkpoint=false", f"hydra.run.dir={tmp_path / 'a'}") == 0
    first = read_result(tmp_path / "a")
    capsys.readouterr()
    assert ptq(monkeypatch, *base, "checkpoint=false", f"hydra.run.dir={tmp_path / 'a'}") == 0
    assert "finished already" in capsys.readouterr().out
    assert read_result(tmp_path / "a") == first
    same = ["checkpoint=false", "protect=none", "protect.blocks=[-1,-2,-3,1,0]", "quant.packed=true"]
    assert ptq(monkeypatch, *base, *same, f"hydra.run.dir={tmp_path / 'b'}") == 0
    captured = capsys.readouterr()
    assert f"finished already, in {tmp_path / 'a'}" in captured.out
    assert "load " not in captured.err
    second = read_result(tmp_path / "b")
    assert (second["metrics"], second["signature"]) == (first["metrics"], first["signature"])
    assert second["protect"]["name"] == "blocks=[-1,-2,-3,1,0]"
    assert (tmp_path / "b" / "report.html").read_text().count("<video") == 2
    # The latents are known, so the checkpoint costs little.
    assert ptq(monkeypatch, *base, f"hydra.run.dir={tmp_path / 'c'}") == 0
    assert "generate hif8        known" in capsys.readouterr().err
    assert (tmp_path / "c" / "checkpoint").is_dir()
    assert read_result(tmp_path / "c")["metrics"] == first["metrics"]


def test_the_control_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = ptq(monkeypatch, "quant=bf16", TWO, "tracker=none", f"hydra.run.dir={tmp_path}")
    assert status == 0
    result = read_result(tmp_path)
    assert result["conversion"] == {"converted": 0, "protected": 50, "skipped": 36}
    # What equal videos get.
    assert result["metrics"]["latent_sqnr"]["mean"] == 100.0
    assert result["metrics"]["ssim"]["mean"] == 1.0
    assert result["verdict"] == "pass"
    assert not (tmp_path / "checkpoint").exists()


def truncated_model(folder: Path) -> str:
    shutil.copytree(tiny.folder(), folder / "model")
    weights = folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    return f"model.path={folder / 'model'}"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("quant.wieghts.rule=direct", "wieghts"),
        ("protect.blocks=[3,40]", "protected block 40 is out of range"),
        (truncated_model, "truncated"),
        ("prompts.texts=[]", "prompts.texts is empty"),
    ],
)
def test_so_does_a_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: Any, named: str
) -> None:
    """Whether the config cannot be composed, the job cannot be, or only its files are looked at."""
    refused(monkeypatch, tmp_path, capsys, override, named, multirun=True)


def refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: Any,
    named: str,
    multirun: bool = False,
) -> None:
    override = override if isinstance(override, str) else override(tmp_path)
    run = tmp_path / "run"
    where = ["-m", f"hydra.sweep.dir={run}"] if multirun else [f"hydra.run.dir={run}"]
    assert ptq(monkeypatch, *where, override) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1, printed
    assert printed[0].startswith("error: ")
    assert named in printed[0]
    left = [path for path in run.rglob("*") if path.name in ("result.json", "report.html", "checkpoint")]
    if multirun and (run / "sweep.json").exists():
        # There it has a row in the sweep's table, which says that it failed.
        left.remove(run / "report.html")
        if (run / "0").exists():
            assert named in json.loads((run / "0" / "result.json").read_text())["error"]
            left.remove(run / "0" / "result.json")
    assert not left


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_no_result(tmp_path: Path) -> None:
    """The process may write no file above 5 MB, so the checkpoint fails as it would on a full disk."""
    command = ["ptq.py", f"model.path={short()}", TWO, *QUICK, "tracker=none", "eval.noise_floor=false"]
    done = forked.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"],
        before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5 << 20, 5 << 20)),
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: cannot write")
    assert os.strerror(errno.EFBIG) in message
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"checkpoint", "checkpoint.partial", "report.html"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_failing_job_of_a_sweep_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block 40 does not exist: that job fails, the other one is complete, and the status says it."""
    status = ptq(monkeypatch, "-m", "protect.blocks=[40],[0]", TWO, "checkpoint=false", f"hydra.sweep.dir={tmp_path}")
    assert status == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: job 0: protected block 40 is out of range")
    failed = read_result(tmp_path / "0")
    assert failed["status"] == "failed"
    assert failed["error"].startswith("protected block 40 is out of range")
    assert failed["protect"] == {"name": "blocks=[40]"}
    html = (tmp_path / "report.html").read_text()
    assert "Job 0 failed" in html
    assert "1 configuration finished, 1 failed" in html
    result = read_result(tmp_path / "1")
    assert result["protect"]["blocks"] == [0]
    assert result["protect"]["name"] == "blocks=[0]"
    assert not (tmp_path / "1" / "checkpoint").exists()
    # The sweep's table goes to the tracker as well as each run.
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("1/wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "table.tex").is_file()


def test_a_sweeps_directory_is_that_sweeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another sweep is refused there and costs nothing of the first; the same one may be given again, with what changes
    no number."""
    where = ["-m", f"hydra.sweep.dir={tmp_path}", "tracker=none"]
    assert ptq(monkeypatch, *where, "protect.blocks=[40],[41]") == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert ptq(monkeypatch, *where, "protect.blocks=[40]") == 1
    assert capsys.readouterr().err == f"error: {tmp_path} holds another sweep: choose another hydra.sweep.dir\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert ptq(monkeypatch, *where, "force=true", "checkpoint=false", "protect.blocks=[40],[41]") == 1
    assert "job 1: protected block 41" in capsys.readouterr().err


def test_a_failing_tracker_costs_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A project name that W&B refuses: a real failure of the real tracker."""
    (tmp_path / "run").mkdir()
    status = ptq(
        monkeypatch, TWO, "eval.noise_floor=false", "tracker.project=a/b%c",
        f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert status == 0
    assert read_result(tmp_path / "run")["status"] == "ok"
    assert (tmp_path / "run" / "checkpoint").is_dir()
    assert "the tracker failed" in (tmp_path / "run" / "log.txt").read_text()
