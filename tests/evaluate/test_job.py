"""``python eval.py`` end to end on eight of tiny-wan's blocks, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests import forked
from tests.jobs import CACHE, QUICK, ROOT, TWO, ptq, run, short
from wanquant.evaluate import evaluation
from wanquant.evaluate.compare import of_pair
from wanquant.evaluate.judges.judging import merged
from wanquant.evaluate.sweep.summary import summarize
from wanquant.runs import pictures
from wanquant.runs.run import digest, read_result

FLOORS = "eval.noise_floor=true"
FLICKER = "eval.dimensions=[temporal_flickering]"
NEW = (
    'prompts.texts=["a red circle moving right on a black background","a green square moving up on a gray background"]'
)


def evaluate(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """``python eval.py`` in this process; the exit status."""
    overrides = (f"cache={CACHE}", *overrides)
    if not any(override.startswith("tracker=") for override in overrides):
        overrides = ("tracker=none", *overrides)
    return run(monkeypatch, "eval", *overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two, of two pairs each."""
    folder = tmp_path_factory.mktemp("made") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        assert ptq(patch, "-m", "protect=none,boundary", TWO, FLOORS, "tracker=none", f"hydra.sweep.dir={folder}") == 0
    return folder


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def entry(run: Path, name: str = "own") -> dict[str, Any]:
    found: dict[str, Any] = read_result(run)["evaluations"][name]
    return found


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_a_sweep_by_vbench_and_in_its_report(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_result(sweep / "0")
    assert evaluate(monkeypatch, f"run={sweep}", FLICKER) == 0
    results = [read_result(sweep / str(job)) for job in range(2)]
    assert {key: value for key, value in results[0].items() if key != "evaluations"} == before
    for result in results:
        found = result["evaluations"]["own"]
        metrics = found["metrics"]
        name = "vbench.temporal_flickering"
        assert set(metrics) == {name, f"bf16.{name}", f"difference.{name}", f"floor_ulp.{name}"}
        for item in metrics[name]["per_item"]:
            assert 0.8 < item["value"] < 1
        assert metrics[f"difference.{name}"]["mean"] == pytest.approx(
            metrics[name]["mean"] - metrics[f"bf16.{name}"]["mean"], abs=1e-12
        )
        assert found["vbench"]["long"] == 0
        assert found["vbench"]["weights"] == {}
        assert found["demonstration"]
    # BF16 is the same in all of them.
    assert (
        len({json.dumps(r["evaluations"]["own"]["metrics"]["bf16.vbench.temporal_flickering"]) for r in results}) == 1
    )
    page = (sweep / "report.html").read_text()
    for words in ("temporal_flickering", "imaging_quality", "not measured", "error flicker"):
        assert words in page
    run_page = (sweep / "1" / "report.html").read_text()
    for words in ("Evaluation: own", "temporal_flickering", "dynamic_degree", "not measured", "How the error looks"):
        assert words in run_page


def test_the_same_by_ptq_itself(tmp_path: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert ptq(monkeypatch, "protect=boundary", TWO, FLOORS, "tracker=none", FLICKER, f"hydra.run.dir={run}") == 0
    assert evaluate(monkeypatch, f"run={sweep / '1'}", FLICKER) == 0
    assert entry(run)["metrics"] == entry(sweep / "1")["metrics"]
    written = (run / "result.json").stat().st_mtime_ns
    assert ptq(monkeypatch, "protect=boundary", TWO, FLOORS, "tracker=none", f"hydra.run.dir={run}") == 0
    assert (run / "result.json").stat().st_mtime_ns == written


def test_other_prompts_are_generated_and_the_runs_own_are_not(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sweep / "1"
    assert evaluate(monkeypatch, f"run={run}", NEW, "prompts.name=new", FLICKER) == 0
    found = entry(run, "new")
    assert found["pairs"] == 2
    own = {item["prompt"]: item["value"] for item in read_result(run)["metrics"]["psnr"]["per_item"]}
    by_prompt = {item["prompt"]: item["value"] for item in found["metrics"]["psnr"]["per_item"]}
    shared = "a red circle moving right on a black background"
    assert by_prompt[shared] == own[shared]
    assert 10 < by_prompt["a green square moving up on a gray background"] < 100
    assert found["metrics"]["floor_ulp.psnr"]["mean"] > found["metrics"]["psnr"]["mean"]
    assert found["metrics"]["color"]["n"] == found["metrics"]["vbench.temporal_flickering"]["n"] == 2
    assert len(found["gates"]["black"]["per_item"]) == 2
    assert found["verdict"] == "pass"
    videos = sorted(path.relative_to(run / "evaluations" / "new") for path in (run / "evaluations").rglob("*.mp4"))
    name = f"{digest('a green square moving up on a gray background')[:8]}-seed0.mp4"
    sides = ("bf16", "bf16_ulp", "quantized", "side_by_side")
    assert [str(video) for video in videos] == [f"{side}/{name}" for side in sides]
    assert "a green square moving up on a gray background, seed 0" in (run / "report.html").read_text()
    capsys.readouterr()
    # Again, into a folder that lost its videos: nothing is measured anew, and the same files are written.
    kept = {path: path.read_bytes() for path in (run / "evaluations").rglob("*.mp4")}
    shutil.rmtree(run / "evaluations")
    assert evaluate(monkeypatch, f"run={run}", NEW, "prompts.name=new", FLICKER) == 0
    assert {path: path.read_bytes() for path in (run / "evaluations").rglob("*.mp4")} == kept
    again = entry(run, "new")
    assert again["metrics"] == found["metrics"]
    # Other pairs of the same name stand beside it.
    assert evaluate(monkeypatch, f"run={run}", NEW, "prompts.name=new", "prompts.seeds=[3]") == 0
    assert len(read_result(run)["evaluations"]) == 2


@pytest.mark.slow
def test_the_standards_prompts_under_the_standards_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that is told the texts are English; what it makes of them does not matter."""
    run, cache = tmp_path / "run", f"cache={tmp_path / 'cache'}"
    english = ["model.language=english", "prompts.texts=[A corgi,A train]"]
    assert ptq(monkeypatch, *english, "tracker=none", f"hydra.run.dir={run}", cache) == 0
    part = ["prompts=vbench", "prompts.dimensions=[temporal_flickering,human_action]", "prompts.first=1"]
    assert evaluate(monkeypatch, f"run={run}", *part, "prompts.seeds=[0,1]", FLICKER, cache) == 0
    found = entry(run, "vbench")
    assert (found["official"], found["pairs"]) == (True, 4)
    assert found["metrics"]["vbench.temporal_flickering"]["n"] == 2
    assert found["metrics"]["floor_seed.vbench.temporal_flickering"]["n"] == 1
    texts = ["In a still frame, a stop sign", "A person is riding a bike"]
    assert sorted(found["texts"]) == sorted(texts)
    names = {path.name for path in (run / "evaluations" / "vbench" / "quantized").iterdir()}
    assert names == {f"{text}-{seed}.mp4" for text in texts for seed in (0, 1)}


def test_a_model_as_it_is_and_beside_another(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = [f"model.path={sweep / '1' / 'checkpoint'}", TWO, *QUICK, FLICKER]
    assert evaluate(monkeypatch, *model, f"hydra.run.dir={tmp_path / 'alone'}") == 0
    result = read_result(tmp_path / "alone")
    assert (result["job"], result["mode"], result["verdict"]) == ("eval", "evaluate", "pass")
    (alone,) = result["evaluations"].values()
    assert {"color", "vbench.temporal_flickering"} <= set(alone["metrics"])
    assert "psnr" not in alone["metrics"]
    assert {"alone.black", "alone.noise"} <= set(alone["gates"])
    assert "temporal_flickering" in (tmp_path / "alone" / "report.html").read_text()
    assert evaluate(monkeypatch, *model, f"reference={short()}", f"hydra.run.dir={tmp_path / 'beside'}") == 0
    (beside,) = read_result(tmp_path / "beside")["evaluations"].values()
    run = read_result(sweep / "1")
    for name in ("latent_sqnr", "psnr", "error_flicker", "color"):
        assert beside["metrics"][name] == run["metrics"][name]
    assert {name: gate["verdict"] for name, gate in beside["gates"].items()} == {
        name: gate["verdict"] for name, gate in run["gates"].items()
    }
    assert beside["metrics"]["vbench.temporal_flickering"] == alone["metrics"]["vbench.temporal_flickering"]


def test_long_videos_are_said_to_be(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep / "0"
    for path in (run / "videos").rglob("0*.mp4"):
        pictures.write_mp4(path, pictures.read_mp4(path), 1)  # 5 frames
    assert evaluate(monkeypatch, f"run={run}", FLICKER) == 0
    assert entry(run)["vbench"]["long"] == 2
    assert "2 of 2 videos last 5.0 s or more and belong to VBench-Long" in (run / "report.html").read_text()


@pytest.mark.slow
def test_one_evaluation_after_another_keeps_both(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep / "1"
    assert evaluate(monkeypatch, f"run={run}", FLICKER) == 0
    before = entry(run)
    assert evaluate(monkeypatch, f"run={run}") == 0
    after = entry(run)
    assert (after["metrics"], after["vbench"]) == (before["metrics"], before["vbench"])
    # So does ptq.py, which makes the same videos again for a checkpoint that is gone.
    assert evaluate(monkeypatch, f"run={run}", NEW, "prompts.name=new") == 0
    shutil.rmtree(run / "checkpoint")
    again = ["protect=boundary", TWO, FLOORS, "tracker=none", f"hydra.run.dir={run}"]
    assert ptq(monkeypatch, *again) == 0
    assert (run / "checkpoint").is_dir()
    assert entry(run)["metrics"] == before["metrics"]
    assert len(list((run / "evaluations" / "new" / "quantized").iterdir())) == 1
    assert entry(run, "new")["pairs"] == 2


def test_the_tracker_gets_an_evaluation(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate(monkeypatch, f"run={sweep / '1'}", FLICKER, "tracker=wandb") == 0
    wandb.teardown()  # a finished run's file is closed by W&B's own process, a little later
    (sent,) = (sweep / "1").glob("wandb/offline-run-*/*.wandb")
    assert b"own/difference.vbench.temporal_flickering" in sent.read_bytes()


def test_scores_made_otherwise_do_not_mix() -> None:
    told = {"version": "1", "foreign_weights": False, "reader": "decord", "device": "cpu", "not_applicable": {}}
    one, two = (
        {
            "prompt_hash": "h",
            "metrics": {f"vbench.{name}": name, "psnr": 1},
            "vbench": {**told, "dimensions": [name], "meanings": {name: ""}, "weights": {"w": "s", name: "t"}},
        }
        for name in ("a", "b")
    )
    both = merged(one, two)
    assert set(both["metrics"]) == {"vbench.a", "vbench.b", "psnr"}
    assert both["vbench"]["dimensions"] == ["a", "b"]
    assert both["vbench"]["weights"] == {"w": "s", "a": "t", "b": "t"}
    for change in ({"version": "2"}, {"device": "cuda"}, {"weights": {"w": "other", "b": "t"}}):
        assert set(merged(one, {**two, "vbench": {**two["vbench"], **change}})["metrics"]) == {"vbench.b", "psnr"}
    assert merged(one, {**two, "prompt_hash": "other"})["metrics"] == two["metrics"]
    assert merged({}, two) == two
    assert set(merged(one, {**two, "vbench": {}, "metrics": {"lpips": 1}})["metrics"]) == {"vbench.a", "psnr", "lpips"}


def test_a_list_is_the_same_in_any_order_and_takes_no_other_lists_videos(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new prompt stands before one of the run's own, which comes first when they are made; and what a killed
    evaluation of other prompts has left under the same name is not taken for it."""
    run, texts = (
        sweep / "1",
        ["a green square moving up on a gray background", "a red circle moving right on a black background"],
    )
    asked = [f"run={run}", f"prompts.texts={json.dumps(texts)}", "prompts.name=mine", FLICKER]
    for side in ("quantized", "bf16", "bf16_ulp"):
        left = run / "evaluations" / "mine" / side / "000-seed0.mp4"
        left.parent.mkdir(parents=True)
        shutil.copy(run / "videos" / "bf16" / "001-seed0.mp4", left)
    assert evaluate(monkeypatch, *asked) == 0
    first = entry(run, "mine")
    for side in ("quantized", "bf16", "bf16_ulp"):
        assert (run / "evaluations" / "mine" / side / f"{digest(texts[0])[:8]}-seed0.mp4").is_file()
    assert evaluate(monkeypatch, *asked) == 0
    assert list(read_result(run)["evaluations"]) == ["mine"]
    assert entry(run, "mine")["metrics"] == first["metrics"]


@pytest.mark.slow
def test_prompts_given_without_a_name_are_not_the_runs_own(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, listed = sweep / "1", tmp_path / "mine.txt"
    assert evaluate(monkeypatch, f"run={run}", NEW) == 0
    assert entry(run, "given")["pairs"] == 2
    listed.write_text("a green square moving up on a gray background\n\n")
    assert evaluate(monkeypatch, f"run={run}", f"prompts.file={listed}", "prompts.seeds=[5]") == 0
    assert (entry(run, "mine")["texts"], entry(run, "mine")["seeds"]) == ([listed.read_text().strip()], [5])
    assert evaluate(monkeypatch, f"run={run}", "prompts.seeds=[7]") == 0
    (other,) = (key for key in read_result(run)["evaluations"] if key.startswith("own-"))
    assert entry(run, other)["seeds"] == [7]
    assert entry(run, other)["texts"] == read_result(run)["provenance"]["prompts"]


def test_a_run_that_cannot_be_judged_is_said_by_its_sweep(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever process it was in."""
    broken = sweep / "1" / "videos" / "bf16" / "000-seed0.mp4"
    broken.write_bytes(b"no video")
    job = ["protect=boundary", TWO, FLOORS, "tracker=none", FLICKER, f"hydra.run.dir={sweep / '1'}"]
    assert ptq(monkeypatch, *job) == 1
    assert f"cannot read the video {broken}" in complaint(capsys)
    summary = summarize(sweep)
    assert [job for job, _ in summary["not_judged"]] == [1]
    assert any("job 1 was not judged" in caution for caution in summary["cautions"])
    assert ptq(monkeypatch, "protect=boundary", TWO, FLOORS, "tracker=none", "eval.dimensions=[dynamic_degree]") == 1
    assert "weights are missing" in complaint(capsys)
    shutil.copy(sweep / "0" / "videos" / "bf16" / "000-seed0.mp4", broken)
    assert ptq(monkeypatch, *job) == 0
    assert not summarize(sweep)["not_judged"]


def launched(cache: Path, *arguments: str, by_accelerate: bool = False) -> str:
    """Two processes with the variables of a launch, or the real launcher's; what they have printed."""
    words = ["eval.py", "tracker=none", f"cache={cache}", FLICKER, *arguments]
    if not by_accelerate:
        both = forked.launch(words)
        assert [process.wait() for process in both] == [0, 0], both[0].err.read_text()
        return "".join(each.out.read_text() for each in both)
    command = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    accelerate = Path(sys.executable).with_name("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(accelerate), *command, "--dynamo_backend", "no", "--main_process_port", "0", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_shares(found: dict[str, Any], cache: Path, pairs: int) -> None:
    """Each pair was measured and each video judged once, by one of two processes."""
    assert found["provenance"]["processes"] == 2
    made = found["provenance"]["made_by_process"]
    assert sum(each.get("pairs", 0) for each in made) == len(list((cache / "pairs").rglob("*.json"))) == pairs
    assert sum(each.get("vbench", 0) for each in made) == len(list((cache / "vbench").rglob("*.json"))) > 0


@pytest.mark.slow
def test_processes_of_one_launch_share_the_work(sweep: Path, tmp_path: Path) -> None:
    """And one process writes."""
    asked = [f"run={sweep / '1'}", NEW, "prompts.seeds=[0,1,2]", "prompts.name=new"]
    said = launched(tmp_path / "cache", *asked)
    assert said.count(" joined: ") == said.count("wanquant ") == 1
    found = entry(sweep / "1", "new")
    assert found["metrics"]["vbench.temporal_flickering"]["n"] == 6
    check_shares(found, tmp_path / "cache", 5)  # one pair is the run's own
    made = found["provenance"]["made_by_process"]
    assert all(each.get("latents", 0) + each.get("pairs", 0) > 0 for each in made), made


@pytest.mark.slow
def test_processes_of_one_launch_share_a_model(sweep: Path, tmp_path: Path) -> None:
    model = [f"model.path={sweep / '1' / 'checkpoint'}", NEW, "prompts.seeds=[0,1]", *QUICK]
    said = launched(tmp_path / "cache", *model, f"hydra.run.dir={tmp_path / 'run'}", by_accelerate=True)
    assert said.count(" joined: ") == said.count("wanquant ") == 1
    found = entry(tmp_path / "run", "given")
    assert found["pairs"] == 4
    check_shares(found, tmp_path / "cache", 4)  # of one batch, so one of them may have done it all


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a measurement; what was finished is not done again, and the end is the same."""
    run, cache = sweep / "1", f"cache={tmp_path / 'cache'}"
    asked = [f"run={run}", NEW, "prompts.seeds=[0,1,2]", "prompts.name=new", FLICKER, cache]
    done: list[Any] = []

    def stop(*arguments: Any) -> dict[str, float]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments)
        return of_pair(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "of_pair", stop)
        assert evaluate(patch, *asked) == 130
    assert "new" not in read_result(run).get("evaluations", {})
    again: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "of_pair", lambda *a: again.append(a) or of_pair(*a))
        assert evaluate(patch, *asked) == 0
    assert (len(done), len(again)) == (3, 2)
    other = Path(shutil.copytree(sweep / "1", tmp_path / "other"))
    shutil.rmtree(other / "evaluations")
    asked[0], asked[-1] = f"run={other}", f"cache={tmp_path / 'other cache'}"
    assert evaluate(monkeypatch, *asked) == 0
    assert entry(other, "new")["metrics"] == entry(run, "new")["metrics"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run={run}", "eval.dimensions=[color]"], "VBench refuses color"),
        (["run={run}", "eval.dimensions=[beauty]"], "VBench has no dimension beauty"),
        (["run={run}", "eval=vbench5"], "`python -m wanquant.doctor fetch subject_consistency motion_smoothness"),
        (["run={run}", "eval.lpips=maybe"], "eval.lpips=maybe: choose auto, on, off"),
        (["run={run}", "eval.lpips=on"], "fetch lpips"),
        (["run={run}", "prompts.texts=[]", "prompts.name=none"], "prompts.texts is empty"),
        (["run={run}", "prompts=vbench", "prompts.dimensions=[temporal_flickering]"], "In a still frame"),
        (["run={run}", "prompts=vbench", "prompts.dimensions=[beauty]"], "prompts.dimensions=beauty: choose"),
        (["run={run}", "prompts=vbench", "prompts.seeds=[7]"], "VBench's standard has the seeds 0 to 4"),
        (["run={run}", NEW, "prompts.name=new", "reference={run}/checkpoint"], "not the model this run was made with"),
        (["run={run}", NEW, "prompts.name=../x"], "a folder is named so"),
        (["run={run}", "model=wan2.1-t2v-14b"], "run= knows its model"),
        (["run={run}", "eval.block_sqnr=true"], "measured by ptq.py"),
        (["model.path=tiny", "reference=tiny", "eval.lpips=on"], "fetch lpips"),
        (["model.path={tmp}/nowhere", "dry_run=true"], "no model folder"),
        (["run={run}", "threads=0"], "threads=0"),
    ],
)
def test_bad_input_is_one_line(
    overrides: list[str], words: str, sweep: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    run = sweep / "1"
    before = (run / "result.json").read_bytes()
    told = [override.format(tmp=tmp_path / "empty", run=run) for override in overrides]
    assert evaluate(monkeypatch, *told, f"hydra.run.dir={tmp_path / 'log'}") == 1
    assert words in complaint(capsys)
    assert (run / "result.json").read_bytes() == before


def test_broken_videos_and_runs_are_one_line(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = read_result(sweep / "0")
    (sweep / "0" / "result.json").write_text(json.dumps({**result, "status": "failed", "error": "out of luck"}))
    assert evaluate(monkeypatch, f"run={sweep}", FLICKER) == 1
    assert "failed (out of luck): there is nothing to evaluate" in complaint(capsys)
    assert "own" in read_result(sweep / "1")["evaluations"]
    (sweep / "0" / "result.json").write_text(json.dumps(result))
    path = sweep / "0" / "videos" / "quantized" / "001-seed0.mp4"
    path.write_bytes(b"no video")
    assert evaluate(monkeypatch, f"run={sweep / '0'}", FLICKER) == 1
    assert f"cannot read the video {path}" in complaint(capsys)
    shutil.rmtree(sweep / "1" / "checkpoint")
    assert evaluate(monkeypatch, f"run={sweep / '1'}", NEW, "prompts.name=new") == 1
    assert "checkpoint is not there to generate from: run ptq.py with checkpoint=true" in complaint(capsys)
    assert evaluate(monkeypatch, f"run={sweep / '1'}", FLICKER) == 0


def test_a_dry_run_says_what_would_be_done(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, f"run={sweep / '0'}", NEW, "prompts.name=new", FLICKER, "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "2 pairs of new, of which 1 would be generated" in out
    assert "0 videos denoised in BF16, 1 quantized, 1 decoded" in out
    assert "1 videos denoised in BF16, 0 quantized, 1 decoded" in out
    assert "dimensions of VBench: temporal_flickering" in out
    assert not (sweep / "0" / "evaluations").exists()
    made, beside = str(sweep / "0" / "checkpoint"), f"reference={short()}"
    assert evaluate(monkeypatch, f"model.path={made}", beside, *QUICK, "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "0 videos denoised in BF16, 5 quantized, 5 decoded" in out
    assert out.count("5 videos denoised in BF16, 0 quantized, 5 decoded") == 2  # as it is, and with its noise perturbed
