"""``python train.py`` end to end: every scope, both kinds of data, several processes, and a process that is killed."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from tests.jobs import ROOT, ptq, short
from tests.qat.short import overrides, result_of, train
from wanquant import load_pipeline
from wanquant.evaluate.fidelity import latent_sqnr
from wanquant.evaluate.stats import Item, compared
from wanquant.evaluate.sweep.summary import summarize
from wanquant.qat.config import QATConfig
from wanquant.qat.job import verdict_of
from wanquant.qat.plan import check_sharded
from wanquant.qat.train_config import read_list
from wanquant.runs.reports.training import drift_table
from wanquant.runs.run import read_result
from wanquant.wan.config import GenerationConfig
from wanquant.wan.generate import generate


@pytest.fixture(scope="module")
def model() -> Path:
    return short(4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(next((folder / "transformer").glob("*.safetensors")))
    return {name: found[name] for name in sorted(found)}


#: Each with what of a block's tensors it may change.
SCOPES: dict[str, tuple[list[str], str]] = {
    "blockwise": (["qat.scope=blockwise", "qat.lr=1e-4", "qat.samples=16"], r"blocks\.[12]\..*"),
    "all": (["qat.scope=all", "qat.gradients=stochastic", "qat.ema=0.9", "qat.bf16_steps=1"], r".*"),
    "blocks": (["qat.scope=blocks", "qat.blocks=[1]"], r"blocks\.1\..*"),
    "norms": (["qat.scope=norms", "qat.loss.blocks=0.5"], r"blocks\..*(norm.*|bias|scale_shift_table)"),
    "scales": (["qat.scope=scales", "quant=static_per_tensor"], r"blocks\.[12]\..*(weight|weight_scale|input_scale)"),
    "lora": (["qat.scope=lora", "qat.lora.rank=2"], r"blocks\.[12]\..*(weight|weight_scale)"),
    "delayed": (
        ["qat.scope=all", "qat.scaling=delayed", "qat.window=2", "quant=static_per_tensor", "quant.attention=qkvp"],
        ".*",
    ),
}


#: Those that have no other test of a whole job.
QUICK_SCOPES = ("blockwise",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_SCOPES else pytest.param(name, marks=pytest.mark.slow) for name in SCOPES]
)
def test_what_is_trained_is_what_is_saved(
    name: str, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words, may_change = SCOPES[name]
    words = overrides(model, cache, *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert train(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "QAT against PTQ baseline: too few pairs" in said
    result = result_of(tmp_path / "run")
    assert result["over_untrained"]["latent_sqnr"]["n"] == 2
    assert result["over_untrained"]["latent_sqnr"]["mean"] == pytest.approx(
        result["metrics"]["latent_sqnr"]["mean"] - result["metrics"]["untrained.latent_sqnr"]["mean"]
    )
    assert result["over_untrained"]["latent_sqnr"]["mean"] != 0
    # The checkpoint makes the same videos.
    items = result["metrics"]["latent_sqnr"]["per_item"]
    pairs, settings = [(item["prompt"], item["seed"]) for item in items], GenerationConfig(**result["generation"])
    reference, found = (
        generate(pipe, pairs, settings, decode=False, batch=24)
        for pipe in (load_pipeline(model, device="cpu"), load_pipeline(tmp_path / "run" / "checkpoint", device="cpu"))
    )
    again = [latent_sqnr(r.latents, f.latents) for r, f in zip(reference, found, strict=True)]
    assert again == [item["value"] for item in items]
    assert isinstance(WanPipeline.from_pretrained(tmp_path / "run" / "checkpoint").transformer, WanTransformer3DModel)
    # Nothing else was touched, protected blocks least of all.
    before, after = tensors(model), tensors(tmp_path / "run" / "checkpoint")
    changed = [
        key for key, value in before.items() if after[key].dtype == value.dtype and not torch.equal(after[key], value)
    ]
    assert [key for key in changed if not re.fullmatch(may_change, key)] == []
    rows = result["training"].get("rows")
    if rows is None:
        assert [row["block"] for row in result["training"]["blocks"]] == [1, 2]
        assert all(len(row["losses"]) == 3 for row in result["training"]["blocks"])
    else:
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert {"loss", "lr", "grad_norm", "grad_norms", "clipped"} <= set(rows[0])
        assert set(rows[0].get("drift", {})) == (set() if name == "lora" else {"blocks.1", "blocks.2"})
        if name != "lora":
            # In its own row, whatever is protected before it.
            assert [None not in row for row in drift_table(rows[:1], 4)] == [False, True, True, False]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Did training help?" in report
    assert "PTQ baseline" in report


@pytest.mark.slow
def test_finished_is_not_trained_again(model: Path, cache: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words = overrides(model, cache, "qat.scope=norms", "qat.data.prompts.seeds=[5]")
    assert train(monkeypatch, *words, f"hydra.run.dir={tmp_path / 'a'}") == 0
    assert train(monkeypatch, *words, f"hydra.run.dir={tmp_path / 'b'}", "qat.save_every=1") == 0
    assert "finished already" in capsys.readouterr().out
    assert result_of(tmp_path / "b")["training"] == result_of(tmp_path / "a")["training"]
    # Other prompts to measure by: the training is known.
    other = "prompts.texts=[a green square moving down on a gray background]"
    assert train(monkeypatch, *overrides(model, cache, *words[:2], other), f"hydra.run.dir={tmp_path / 'c'}") == 0
    assert "train" in result_of(tmp_path / "c")["provenance"]["from_cache"]


@pytest.fixture(scope="module")
def validated(model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that is looked at on its way, and tracked; its blocks are written otherwise than their preset."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    more = ["qat.scope=norms", "qat.check_every=2", "qat.recompute=true", "qat.floor=1", "tracker=wandb", "qat.seed=3"]
    with pytest.MonkeyPatch.context() as patch:
        words = overrides(model, cache, *more, "protect.blocks=[-1,0]", f"hydra.run.dir={folder}")
        assert train(patch, *words) == 0
    wandb.teardown()
    return folder


def test_the_untrained_baseline_is_ptqs(
    validated: Path, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One takes the other's latents from the cache, however the blocks are written."""
    alone = [word for word in overrides(model, cache) if not word.startswith("qat.")]
    assert ptq(monkeypatch, *alone, "checkpoint=false", f"hydra.run.dir={tmp_path / 'ptq'}") == 0
    ptqs = read_result(tmp_path / "ptq")
    assert f"generate {ptqs['quant']['format']}" in ptqs["provenance"]["from_cache"]
    trained = result_of(validated)["metrics"]
    for name in ("step_sqnr", "psnr", "shape_speed", "motion_speed", "attributes"):
        assert trained[f"untrained.{name}"]["per_item"] == ptqs["metrics"][name]["per_item"], name


def test_training_without_videos_is_judged_by_single_steps(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = overrides(model, cache, "qat.scope=norms", "eval.videos=false", f"hydra.run.dir={tmp_path / 'run'}")
    assert train(monkeypatch, *words) == 0
    result = result_of(tmp_path / "run")
    assert result["metrics"].keys() == {"step_sqnr", "untrained.step_sqnr"}
    assert result["over_untrained"].keys() == {"step_sqnr"}
    assert "QAT against PTQ baseline: too few pairs" in capsys.readouterr().out
    assert not (tmp_path / "run" / "videos").exists()
    assert "No videos were made" in (tmp_path / "run" / "report.html").read_text()


def test_bf16_is_fine_tuned_in_the_same_loop(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = ["qat.data.source=folder", f"qat.data.path={make_videos(tmp_path / 'films')}"]
    words = overrides(model, cache, "qat=off", *data, f"hydra.run.dir={tmp_path / 'run'}", "qat.lr=1e-4")
    assert train(monkeypatch, *words) == 0
    assert "fine-tuned against BF16 as it was: too few pairs" in capsys.readouterr().out
    result = result_of(tmp_path / "run")
    assert result["conversion"]["converted"] == 0
    assert result["metrics"]["untrained.latent_sqnr"]["mean"] == 100
    assert result["training"]["rows"][0]["flow"] > 0
    tuned, plain = tensors(tmp_path / "run" / "checkpoint"), tensors(model)
    assert tuned.keys() == plain.keys()
    assert not torch.equal(tuned["blocks.1.ffn.net.2.weight"], plain["blocks.1.ffn.net.2.weight"])


def make_videos(folder: Path) -> Path:
    """Four drawn videos and their captions, in a CSV file."""
    import numpy as np

    from wanquant.runs.pictures import write_mp4
    from wanquant.wan.tiny import all_scenes, draw

    lines = ["file,caption"]
    for number, scene in enumerate(all_scenes()[:4]):
        write_mp4(folder / f"{number}.mp4", draw(scene, np.random.default_rng(number)), 8)
        lines.append(f"{number}.mp4,{scene.caption}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def losses(result: dict[str, Any]) -> list[Any]:
    training = result["training"]
    return [row["losses"] for row in training["blocks"]] if "blocks" in training else training["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blockwise", "all"])
def test_two_processes_train_as_one_does(scope: str, model: Path, cache: Path, tmp_path: Path) -> None:
    """With exact products, to 1e-4 of the loss. Of whole models the one takes each batch in the halves that are the
    two's, since products of another size round otherwise, and some values over to the next of the format."""
    words = overrides(model, cache, f"qat.scope={scope}", "quant.product=exact", "qat.precision=fp32", "qat.lr=1e-4")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, prefix in (("one", []), ("two", launch)):
        parts = 2 if scope == "all" and name == "one" else 1
        more = [f"qat.accumulation={parts}", f"hydra.run.dir={tmp_path / name}"]
        command = [sys.executable, *prefix, "train.py", *words, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("QAT against PTQ baseline") == 1
    results = [result_of(tmp_path / name) for name in ("one", "two")]
    assert [result["training"]["processes"] for result in results] == [1, 2]
    one, two = map(losses, results)
    if scope == "all":
        one, two = ([[row["loss"] for row in rows]] for rows in (one, two))
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
def test_two_sharded_processes_train_as_one_does(model: Path, cache: Path, tmp_path: Path) -> None:
    """FSDP2 as accelerate is configured to it: losses to 1e-5, and what is saved is whole. The one takes each batch in
    the halves that are the two's, since products of another size round otherwise."""
    asked = ["qat.scope=all", "quant.product=exact", "qat.precision=fp32", "qat.lr=1e-4", "qat.ema=0.9"]
    asked += ["qat.save_every=1", "eval.videos=false"]
    launch = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    launch += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_cpu_ram_efficient_loading", "false"]
    launch += ["--fsdp_transformer_layer_cls_to_wrap", "WanTransformerBlock", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, prefix, parts in (("one", [], 2), ("two", launch, 1)):
        words = overrides(model, cache, *asked, f"qat.accumulation={parts}", f"hydra.run.dir={tmp_path / name}")
        command = [sys.executable, *prefix, "train.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([row["loss"] for row in losses(result_of(tmp_path / name))] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    whole, sharded = (tensors(tmp_path / name / "checkpoint") for name in ("one", "two"))
    assert {name: (t.shape, t.dtype) for name, t in sharded.items()} == {
        name: (t.shape, t.dtype) for name, t in whole.items()
    }
    before = {name: tensor for name, tensor in tensors(model).items() if tensor.dtype == whole[name].dtype}
    learned, apart = (
        sum(float((one[name].float() - other[name].float()).abs().sum()) for name in before)
        for one, other in ((whole, before), (whole, sharded))
    )
    assert apart < 0.05 * learned, (apart, learned)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blockwise", "all"])
def test_killed_five_times_it_ends_the_same(scope: str, model: Path, tmp_path: Path) -> None:
    """By SIGKILL at random moments of the training."""

    def command(name: str) -> list[str]:
        more = ["qat.steps=40", "qat.save_every=3", "qat.ema=0.9", f"hydra.run.dir={tmp_path / name}"]
        words = overrides(model, tmp_path / f"cache-{name}", f"qat.scope={scope}", *more)
        return [sys.executable, "train.py", *words]

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    pick, killed = random.Random(1), 0
    training = tmp_path / "cache-killed" / "training"
    while killed < 5:
        known = set(training.rglob("state-*"))
        process = subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and set(training.rglob("state-*")) <= known:
            time.sleep(0.01)
        time.sleep(pick.random() * 0.3)
        process.kill()
        assert process.wait() != 0, "it ended before it was killed"
        killed += 1
    subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True)
    whole, again = (result_of(tmp_path / name) for name in ("whole", "killed"))
    for result in (again, whole):
        assert result["training"].pop("memory")["peak"] > 0  # measured, and never twice the same
    assert again["training"] == whole["training"]
    assert again["metrics"] == whole["metrics"]


def test_what_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        check_sharded(QATConfig(scope="all"))
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharded(QATConfig(scope="all"))
    with pytest.raises(ValueError, match=r"qat\.scope=blockwise"):
        check_sharded(QATConfig(scope="blockwise"))
    with pytest.raises(ValueError, match=r"qat\.check_every"):
        check_sharded(QATConfig(scope="all", check_every=1))


def test_a_dry_run_says_what_memory_the_training_needs(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = overrides(model, cache, "dry_run=true", "qat.scope=all", "qat.ema=0.9", f"hydra.run.dir={tmp_path / 'run'}")
    assert train(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^training +[\d.]+ MB on the device: model .*, weights .*, optimizer .*, average .*, activations", said, re.M
    )
    assert "less with qat.accumulation=2, qat.recompute=true" in said
    assert re.search(r"^ +train +[\d.]+ (s|min)$", said, re.M), "the time in all has the training in it"
    assert not (tmp_path / "run").exists()


def test_the_tracker_gets_every_step_and_the_validation(validated: Path) -> None:
    sent = b"".join(path.read_bytes() for path in validated.glob("wandb/offline-run-*/*.wandb"))
    for name in (b"grad_norms/blocks.1", b"drift/blocks.2", b"clipped", b"step_sqnr", b"untrained"):
        assert name in sent
    checks = result_of(validated)["training"]["checks"]
    assert [row["step"] for row in checks] == [1, 2]
    assert checks[0]["untrained"] == checks[1]["untrained"]
    assert checks[0]["step_sqnr"] != checks[1]["step_sqnr"]
    assert "Validation" in (validated / "report.html").read_text()


@pytest.mark.slow
def test_out_of_memory_says_what_was_planned(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A real one: 4,096 samples at a time and 2 GB for them."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (1 << 31), -1)
    )
    try:
        words = overrides(model, cache, "qat.scope=all", "qat.batch=4096", f"hydra.run.dir={tmp_path / 'run'}")
        assert train(monkeypatch, *words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"out of memory: the plan was [\d.]+ GB; to shrink it: qat.accumulation=2", error)


def test_a_list_of_videos_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    lists = {
        "x.jsonl": (
            '{"video": "a.mp4", "text": "one"}\n\n{"file": "a.mp4"}\n',
            "line 3: it needs a file and a caption",
        ),
        "y.jsonl": ("{\n", "line 1: not JSON"),
        "z.csv": ("path,prompt\nb.mp4,two\n", "line 2: there is no video"),
        "empty.csv": ("file,caption\n", "lists no videos"),
    }
    for name, (text, said) in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=said):
            read_list(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "caption": "one"}\n')
    assert read_list(tmp_path) == [(tmp_path / "a.mp4", "one")]
    captions = ['two\nlines, "quoted"', "a\u2028b", "=1"]
    with (tmp_path / "odd.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *(("a.mp4", caption) for caption in captions)])
    rows = "\n".join(json.dumps({"file": "a.mp4", "text": text}, ensure_ascii=False) for text in captions)
    (tmp_path / "odd.jsonl").write_text(rows, encoding="utf-8")
    for name in ("odd.csv", "odd.jsonl"):
        assert [caption for _, caption in read_list(tmp_path / name)] == captions


@pytest.mark.slow
def test_a_sweep_says_what_each_has_over_its_baseline(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [word for word in overrides(model, cache) if not word.startswith("qat.lr=")]
    sweep = tmp_path / "sweep"
    assert train(monkeypatch, "-m", "qat=norms,scales", "qat.lr=1e-3", *words, f"hydra.sweep.dir={sweep}") == 0
    said = capsys.readouterr().out
    assert "minus its PTQ baseline, dB" in said
    assert "norms lr=0.001" in said
    assert said.count("too few pairs") >= 4
    rows = summarize(sweep)["rows"]
    assert {row["name"].split()[0] for row in rows} == {"norms", "scales"}
    assert all(row["over_untrained"][name]["n"] == 2 for row in rows for name in ("latent_sqnr", "step_sqnr"))


@pytest.mark.slow
def test_lora_begins_the_same_whatever_was_drawn_before(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sweep, whose jobs share a process."""
    found = []
    for number in range(2):
        torch.manual_seed(number)
        run = tmp_path / str(number)
        words = overrides(model, cache, "qat.scope=lora", "qat.seed=9", f"hydra.run.dir={run}")
        assert train(monkeypatch, *words, *(["force=true"] if number else [])) == 0
        found.append(result_of(run)["training"]["rows"])
    assert found[0] == found[1]


@pytest.mark.slow
def test_modules_that_stay_bf16_inside_a_trained_block(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = overrides(model, cache, "protect.modules=[ffn.net.2]", "qat.lr=1e-4", f"hydra.run.dir={tmp_path / 'run'}")
    assert train(monkeypatch, *words) == 0
    assert result_of(tmp_path / "run")["conversion"]["protected"] == 22
    words = overrides(model, cache, "qat.blocks=[0]", f"hydra.run.dir={tmp_path / 'none'}")
    assert train(monkeypatch, *words) == 1


def test_a_model_that_breaks_is_told_as_that(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Norms trained at such a rate that the videos are not finite; the sweep's table stands."""
    words = [word for word in overrides(model, cache) if not word.startswith("qat.lr=")]
    asked = ["qat=norms", "qat.lr=10", "qat.clip=0", "qat.schedule=constant", "qat.seed=4", "qat.diverged=1e9"]
    train(monkeypatch, "-m", *asked, *words, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert verdict_of(compared([Item("a", 0, math.nan), Item("b", 0, 1.0)]), False) == "cannot be told"
    assert (tmp_path / "sweep" / "report.html").exists()
