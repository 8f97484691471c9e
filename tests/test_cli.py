"""The commands: what they say first, what they answer to a mistake, and how an interrupt ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

import wanquant
from wanquant.choices import nearest
from wanquant.config import CONF, SCHEMAS
from wanquant.mistakes import keys_of

ROOT = Path(wanquant.__file__).resolve().parent.parent
#: Imports nothing that takes seconds: whoever tries ends with this word.
LIGHT = """
import sys
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "matplotlib", "wandb", "numba", "scipy"):
            raise SystemExit(f"TOO HEAVY: {name}")
sys.meta_path.insert(0, Heavy())
from wanquant.cli import main
"""
#: One command after the other, in one process: a line of JSON for each.
ALL = (
    LIGHT
    + """
import contextlib, io, json
from hydra.core.global_hydra import GlobalHydra
for words in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["wanquant", *words]
    GlobalHydra.instance().clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
"""
)


def light(*words: str) -> subprocess.CompletedProcess[str]:
    """``wanquant`` in a process that cannot import what is heavy."""
    command = [sys.executable, "-c", LIGHT + "main()", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


MISTAKES = [
    ("ptq protec=boundary", "error: there is no key protec: did you mean protect?"),
    ("ptq protect=boundry", "error: protect=boundry: did you mean boundary? choose auto, "),
    ("ptq -m protect=none,boundry", "error: protect=boundry: did you mean boundary? choose auto, "),
    ("ptq prompts.sedes=[0]", "error: there is no key prompts.sedes: did you mean prompts.seeds?"),
    ("ptq quant.act.rul=direct", "error: there is no key quant.act.rul: did you mean quant.activations.rule?"),
    ("ptq quant=nvfp4", "error: quant=nvfp4: did you mean nvfp4_dynamic, nvfp4_gptq, nvfp4_rotated, "),
    ("ptq quant.product=exct", "error: quant.product=exct: did you mean exact? choose fast, exact, native"),
    (
        "ptq +quant.prodct=exact",
        "error: unknown key quant.prodct: no part of the program reads it. did you ",
    ),
    ("ptq ~protec", "error: there is no key protec: did you mean protect?"),
    ("ptq hydra.swep.dir=x", "error: there is no key hydra.swep.dir: did you mean hydra.sweep.dir?"),
    ("ptq hydra/launcher=jobli", "error: hydra/launcher=jobli: did you mean joblib? choose "),
    ("train qat=onn", "error: qat=onn: did you mean on? choose "),
    ("train qat.data.sorce=folder", "error: there is no key qat.data.sorce: did you mean qat.data.source?"),
    ("train qat.scope=blokwise", "error: qat.scope=blokwise: did you mean blockwise? choose all, "),
    ("eval evl=vbench5", "error: there is no key evl: did you mean eval?"),
    ("eval eval=vbench", "error: eval=vbench: did you mean vbench5? choose "),
    ("eval eval.lpips=atuo", "error: eval.lpips=atuo: did you mean auto? choose auto, on, off"),
    ("pqt", "error: program=pqt: did you mean ptq? choose ptq, train, eval, report, export, doctor"),
]


HELP = ["--help", *(f"{program} --help" for program in (*SCHEMAS, "report", "export"))]


class Answer(NamedTuple):
    status: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """To each of the mistakes and calls for help, made one after the other in a single process."""
    folder = tmp_path_factory.mktemp("mistakes")
    runs = {words: folder / str(number) for number, words in enumerate([*(words for words, _ in MISTAKES), *HELP])}
    where = {words: f"hydra.{'sweep' if '-m' in words else 'run'}.dir={run}" for words, run in runs.items()}
    asked = [[*words.split(), *([] if words in ("pqt", *HELP) else [where[words]])] for words in runs]
    command = [sys.executable, "-c", ALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=json.dumps(asked), check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {words: Answer(*answer, run) for (words, run), answer in zip(runs.items(), told, strict=True)}


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_answered_at_once_with_what_may_be_meant(
    words: str, message: str, answers: dict[str, Answer]
) -> None:
    answer = answers[words]
    assert answer.status == (2 if words == "pqt" else 1)
    assert answer.err.startswith(message)
    assert answer.err.count("\n") == 1
    assert not answer.folder.exists()


def test_a_key_in_a_file_of_the_users_own_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "mine.yaml").write_text("name: mine\ntexts: [a]\nsedes: [0]\n")
    done = light("ptq", "--config-dir", str(tmp_path), "prompts=mine", f"hydra.run.dir={tmp_path}/run")
    assert done.stderr == "error: there is no key prompts.sedes: did you mean prompts.seeds?\n"


@pytest.mark.parametrize("words", HELP)
def test_help_needs_nothing_heavy(words: str, answers: dict[str, Answer]) -> None:
    assert answers[words].status == 0
    assert answers[words].err == ""
    assert words.split()[0] in answers[words].out


@pytest.mark.parametrize("program", [*SCHEMAS, "report", "export", "doctor"])
def test_the_first_line_comes_before_the_imports(program: str, tmp_path: Path) -> None:
    words = {"export": ["a", "b", "--layout", "bf16"], "report": ["a"], "doctor": []}.get(
        program, ["dry_run=true", f"run={tmp_path}"] if program == "eval" else ["dry_run=true"]
    )
    done = light(program, *words)
    assert done.stdout.startswith(f"wanquant {wanquant.__version__} {program}")
    assert "TOO HEAVY" in done.stderr or program == "report"


def test_what_is_like_nothing_has_no_guess() -> None:
    keys = list(keys_of(SCHEMAS["train"]))
    assert "qat.lora.rank" in keys
    assert nearest("zzzzzz", keys) is None
    assert nearest("sedes", keys) in ("prompts.seeds", "calib.seeds", "qat.data.prompts.seeds")
    assert nearest("Protect", keys) == "protect"


def interrupted(
    command: list[str], ready: Callable[[psutil.Process, str], bool], whole_group: bool = True
) -> tuple[list[str], float]:
    """Lines of stderr behind SIGINT, which is sent once the process, or what it has printed, is ``ready``, and the
    seconds until it and all it has started have ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    own, line = psutil.Process(process.pid), process.stdout.readline()
    while not ready(own, line):
        time.sleep(0.05)
    children = own.children(recursive=True)
    begun = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    seconds = time.monotonic() - begun
    assert process.returncode == 130, errors
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return errors.strip().splitlines(), seconds


def test_an_interrupt_during_the_imports(tmp_path: Path) -> None:
    command = [sys.executable, "ptq.py", f"hydra.run.dir={tmp_path}", "tracker=none"]
    lines, seconds = interrupted(command, lambda process, line: line.startswith("wanquant"))
    assert lines == [f"interrupted: the same command with hydra.run.dir={tmp_path} goes on there"]
    assert seconds < 3


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_of_a_sweep_in_several_processes(whole_group: bool, tmp_path: Path) -> None:
    """As a terminal signals all of them, or as `kill -INT` does the first alone."""
    command = [sys.executable, "ptq.py", "-m", "protect=none,boundary", "tracker=none", f"cache={tmp_path / 'cache'}"]
    command += [f"hydra.sweep.dir={tmp_path}/sweep", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]

    def ready(process: psutil.Process, line: str) -> bool:
        return len(list((tmp_path / "sweep").glob("*/log.txt"))) == 2  # both are at work

    lines, seconds = interrupted(command, ready, whole_group)
    assert lines[-1] == f"interrupted: the same command with hydra.sweep.dir={tmp_path}/sweep goes on there"
    assert not any("Traceback" in line for line in lines)
    assert seconds < 3


@pytest.mark.slow
def test_a_killed_worker_ends_a_sweep_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "ptq.py", "-m", "protect=none,boundary", "tracker=none", f"cache={tmp_path / 'cache'}"]
    command += [f"hydra.sweep.dir={tmp_path}/sweep", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "sweep").glob("*/log.txt"))) < 2:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if any("LokyProcess" in word for word in child.cmdline())).kill()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: a worker was killed, by hand or for its memory: what is")
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not list((tmp_path / "sweep").glob("*/result.json"))


@pytest.mark.parametrize(
    ("body", "least"),
    [
        ("while True:\n    try: time.sleep(9)\n    except KeyboardInterrupt: pass", 1.0),
        ("class A:\n    def __del__(self): time.sleep(9)\nA()\ntime.sleep(60)", 0.0),
        ("import threading; threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()", 0.0),
    ],
    ids=["swallowed", "in a finalizer", "waiting for a lock"],
)
def test_an_interrupt_that_is_not_heard(body: str, least: float, tmp_path: Path) -> None:
    """A library may swallow it, or be where Python raises nothing: the process ends all the same."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\nfrom wanquant import cli, interrupt\n"
        f"def run(program):\n    print('at work', flush=True)\n    exec({body!r}, {{'time': time}})\n"
        "cli._run = run\ncli.main('ptq')\n"
    )

    def ready(process: psutil.Process, line: str) -> bool:
        time.sleep(0.3)  # for it to be where it is not heard
        return bool(line)

    lines, seconds = interrupted([sys.executable, str(script)], ready)
    assert lines == ["interrupted: nothing was begun; the same command starts again"]
    assert least <= seconds < 3


def test_a_termination_ends_the_workers_too(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import subprocess, sys, time\nfrom wanquant import cli\n"
        "def run(program):\n    child = subprocess.Popen(['sleep', '60'])\n    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
        "cli._run = run\ncli.main('ptq')\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.terminate()
    assert process.communicate(timeout=10)[1] == "terminated\n"
    assert process.returncode == 143
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git has or would take, and installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    source = folder / "source"
    for name in listed.stdout.splitlines() if listed.returncode == 0 else []:
        if name.startswith(("wanquant/", "conf/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    if listed.returncode:
        pytest.skip("no git checkout to build a wheel of")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "dist"), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-compile", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True
    )
    return target


def from_wheel(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The console script of the installed wheel, outside of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, str(site / "bin" / "wanquant"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_the_wheel_has_all_there_is(installed: Path) -> None:
    """Code, templates, tiny-wan; and the configs, which lie beside the package in the checkout."""
    source = installed.parent / "source"
    for ours, there in ((source / "wanquant", "wanquant"), (source / "conf", "wanquant/conf")):
        wanted = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
        assert wanted
        assert wanted <= {path.relative_to(installed / there) for path in (installed / there).rglob("*")}


def test_every_folder_of_the_package_is_listed() -> None:
    """By name, because the configs lie beside the package in the checkout: a new folder would be left out."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    code = {path.parent for path in (ROOT / "wanquant").rglob("*.py")}
    groups = {path.relative_to(CONF) for path in Path(CONF).rglob("*") if path.is_dir()}
    wanted = {".".join(path.relative_to(ROOT).parts) for path in code}
    wanted |= {"wanquant.conf", *(".".join(["wanquant.conf", *path.parts]) for path in groups)}
    assert wanted <= set(listed)


def group_of_ones_own(folder: Path) -> list[str]:
    """Words of a command there that has it and chooses it."""
    (folder / "mine" / "protect").mkdir(parents=True)
    (folder / "mine" / "protect" / "two.yaml").write_text("name: two\nblocks: [0, -1]\n")
    return ["ptq", "--config-dir", "mine", "protect=two"]


def test_the_wheel_finds_its_configs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """And a group of the user's own."""
    done = from_wheel(installed, tmp_path, *group_of_ones_own(tmp_path), "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "protect:\n  name: two\n" in done.stdout
    for words in (["train", "qat=onn"], ["eval", "evl=x"]):
        assert "did you mean" in from_wheel(installed, tmp_path, *words).stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The main job's plan."""
    done = from_wheel(installed, tmp_path, *group_of_ones_own(tmp_path), "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert f"P{38 * 'q'}P" in done.stdout
    assert done.stdout.startswith(f"wanquant {wanquant.__version__} ptq: dry run")
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
