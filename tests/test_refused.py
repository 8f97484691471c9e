"""What the three programs refuse: a table of bad inputs, each with its one line. The exit status is 1, and no result is
left. What Hydra itself refuses is in ``test_cli``; what an evaluation refuses of a run, beside that run.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.jobs import CACHE, QUICK, TWO, run, short
from wanquant.wan.checkpoints.checkpoint import WEIGHTS
from wanquant.wan.checkpoints.sums import seal

DOG = "not a tiny-wan caption: 'a red dog' (the grammar is wanquant.wan.tiny.caption)"
NAN = f"AT/nan/transformer/{WEIGHTS}: tensor blocks.3.ffn.net.2.weight holds 1 NaN or infinite value of 65536: "
CHANGED = f"AT/changed/transformer/{WEIGHTS} is not what was written (its SHA-256 is not that in SHA256SUMS): "
QUOTED = "cannot be read; a text is quoted twice, for Hydra and for the shell: "
#: How the line begins behind "error: "; ``AT`` is the folder of what the inputs name (``places``).
REFUSED = r"""
ptq model.path=AT/x=1 | model.path=AT/x=1 QUOTED'model.path="AT/x=1"'
ptq model.path=AT/ü | model.path=AT/ü QUOTED'model.path="AT/ü"'
ptq model.path=AT/c,d | model.path=AT/c,d cannot be read; a list is 'model.path=[AT/c,d]', texts in it in double quotes;
ptq 'prompts.texts=[say "hi"]' | prompts.texts=[say "hi"] cannot be read; a list is 'prompts.texts=[...]', texts in it
ptq prompts.seeds | prompts.seeds: give a key and its value, key=value
ptq quant.wieghts.rule=direct | there is no key quant.wieghts.rule: did you mean quant.weights.rule?
ptq +quant.spin=up | unknown key quant.spin: no part of the program reads it.
ptq model.generation.steps=many | Error merging override model.generation.steps=many; Value 'many' of type 'str'
ptq force=maybe | Error merging override force=maybe; Value 'maybe' is not a valid bool (type str)
ptq mode=quantise | mode=quantise: did you mean quantize? choose quantize, analyze, convert
ptq model.path= | model.path is empty: give a folder in diffusers layout, a hub id, or tiny
ptq model.path=./nowhere | no model folder ./nowhere: give a folder in diffusers layout, a hub id, or tiny
ptq model.path=AT/file | AT/file: only .safetensors and .gguf files are read, or folders
ptq model.path=AT/empty | AT/empty is no diffusers pipeline: it has no model_index.json
ptq model.path=AT/truncated | AT/truncated/transformer/WEIGHTS is truncated or damaged:
ptq model.path=AT/missing | AT/missing/tokenizer/tokenizer_config.json is missing: the checkpoint is incomplete
ptq model.path=AT/changed | CHANGED
ptq model.device=tpu | model.device=tpu: choose one of auto, npu, cuda, cpu, or a card, cuda:1
ptq model.device=cpu:x | model.device=cpu:x: choose one of auto, npu, cuda, cpu, or a card, cuda:1
ptq model.batch=0 quant=osp_next | model.batch=0: must be at least 1
ptq model.other_frames=[18] | model.other_frames=[18]: must be 5, 9, 13, ... (4n + 1)
ptq model.generation.steps=0 | generation.steps=0: must be at least 1
ptq model.generation.num_frames=18 | generation.num_frames=18: must be 1, 5, 9, ... (4n + 1)
ptq model.generation.height=70 | generation.height=70: must be a multiple of 16
ptq model.generation.flow_shift=inf | generation.flow_shift=inf: must be positive and finite
ptq model.generation.guidance_scale=nan | generation.guidance_scale=nan: must be finite
ptq model.generation.guidance_scale_2=3 | model.generation.guidance_scale_2 is for pipelines of two transformers
ptq model.outliers.count=9 | model.outliers.count=9: the model has 8 blocks
ptq protect.blocks=[3,40] | protected block 40 is out of range: the model has 8 blocks, -8 to 7
ptq protect.blocks=[0,-8] | protected blocks 0 and -8 are the same of 8 blocks
ptq protect.modules=[ffn] | pattern 'ffn' of protected modules matches nothing (a whole name has to match:
ptq "protect.modules=['(']" | pattern '(' of protected modules is not a regular expression:
ptq "protect.modules=['.*']" | protect leaves no linear to quantize: protect fewer blocks or modules
ptq protect=auto protect.budget=8 | protect.budget=8: must lie between 1 and 7
ptq quant.smoothing=2 | quant.smoothing=2.0: must lie between 0 and 1, or be null for none
ptq quant.weights.rule=absmax | unknown scale rule 'absmax': did you mean amax? choose direct, amax[/TARGET] (amax/15)
ptq quant.activations.rule=amax/65536 | quant.activations.rule: target 65536 is beyond the range of hif8
ptq quant.activations.static=true | quant.activations.static=true needs quant.activations.granularity=per_tensor
ptq quant.format=int8 quant.product=fp8 | quant.product=fp8 is for hif8, e4m3, e5m2, mxfp8: with int8 choose
ptq quant=mxfp8_w8a8 quant.weights.granularity=per_block | granularity per_block is gone, blocks are the format's own:
ptq quant.format=hif4 quant.overflow=inf | quant.overflow=inf: hif4 has no infinity, choose saturate
ptq quant=nvfp4_w4a8 quant.product=fp8 | quant.product=fp8: there is none of nvfp4 with e4m3, choose fast or exact
ptq quant=weight_mse quant.product=fp8 | quant.product=fp8 carries hif8 up to a target: choose
ptq 'prompts.texts=["a red dog"]' | DOG
ptq 'calib.texts=["a red dog"]' | DOG
ptq prompts.texts=[] | prompts.texts is empty: give at least one prompt
ptq prompts.seeds=[0,0] | prompts.seeds holds a value twice
ptq prompts.seeds=[-1] | prompts.seeds must lie between 0 and 2^63
ptq prompts.file=AT/nowhere.txt | prompts.file=AT/nowhere.txt: [Errno 2] No such file or directory
ptq threads=0 | threads=0: must be at least 1
ptq eval.dimensions=[beauty] | eval.dimensions: VBench has no dimension beauty; choose of
ptq tracker.mode=sometimes | tracker.mode=sometimes: choose offline, online
ptq hydra.run.dir=AT/home | AT/home is neither empty nor a run directory: choose another hydra.run.dir
ptq mode=analyze quant.format=e4m3 | mode=analyze looks at HiF8, not at e4m3: leave quant.format as it is
ptq mode=quantize convert.to=x | convert is for mode=convert, not for mode=quantize
ptq mode=convert protect=auto | mode=convert cannot know the blocks that protect.by=
ptq mode=convert model=tiny-outliers | mode=convert takes a model as its files have it: leave model.outliers out
ptq mode=convert eval.dimensions=[temporal_flickering] | mode=convert makes no videos to judge: leave eval.dimensions
ptq mode=convert checkpoint=false | mode=convert makes a checkpoint and nothing else: leave checkpoint=true
ptq mode=convert quant=static_per_tensor convert.statistics=nowhere | convert.statistics=nowhere: not the
ptq mode=convert convert.to=AT/home | convert.to=AT/home is there already: choose another folder, or remove it
ptq mode=convert model.path=AT/nan | NAN
ptq mode=convert model.path=AT/changed | CHANGED
train qat.scope=everything | qat.scope=everything: choose all, blocks
train qat.scope=all qat.blocks=[1] | qat.scope=all trains every block: choose qat.scope=blocks for some
train qat.scope=blocks | qat.scope=blocks needs qat.blocks=[...]
train qat.scope=blocks qat.blocks=[9] | trained block 9 is out of range: the model has 8 blocks, -8 to 7
train qat.scope=lora protect.blocks=[0,1,2,3,4,5,6,7] | protect leaves no linear to quantize: protect fewer blocks
train qat.steps=0 | qat.steps=0: must be at least 1
train qat.batch=5 qat.accumulation=2 | qat.batch=5 does not divide into qat.accumulation=2 parts of each of
train qat.bf16_steps=3 qat.scope=all | qat.bf16_steps=3 leaves none of qat.steps=3 to quantize
train qat.loss.flow=1 qat.scope=all | qat.loss.flow is for videos: choose qat.data.source=scenes or folder
train qat.loss.output=0 qat.scope=all | qat.loss: flow, output and blocks are all 0, so nothing would be learned
train qat.scaling=delayed qat.scope=all | scaling=delayed makes static scales: set quant.activations.static=true
train qat.gradients=hif4 | qat.gradients=hif4: did you mean hif8? choose none, hif8, stochastic
train quant=bf16 | quant.format=bf16 quantizes nothing: fine-tune with qat=off
train qat=off qat.scope=lora | qat.scope=lora is for a quantized model: choose all, blocks or norms
train qat.data.source=folder qat.scope=all qat.data.path=nowhere | qat.data.path=nowhere: [Errno 2] No such file
train qat.data.source=tape | qat.data.source=tape: choose trajectories, scenes, folder
train LEARNED | qat.data holds a prompt that is measured on: a blue square moving up on a white background
train qat.scope=scales qat.bf16_steps=1 | qat.scope=scales has no use for qat.bf16_steps: without rounding there are no
train qat.samples=3 | qat.samples=3: at least 16, of which some are set aside
train mode=analyze | mode=analyze: train.py has no other than quantize
train qat.lrr=1 | there is no key qat.lrr: did you mean qat.lr?
eval run=AT/nowhere | there is no folder AT/nowhere
eval run=AT/empty | AT/empty holds no result.json: the run was not finished
eval model.path=AT/nowhere | no model folder AT/nowhere: give a folder in diffusers layout, a hub id, or tiny
eval model.path=AT/truncated | AT/truncated/transformer/WEIGHTS is truncated or damaged:
eval model.path=AT/changed | CHANGED
eval model.path=AT/nan | NAN
eval eval.lpips=on | eval.lpips=on compares with a reference: give reference=<folder>
eval eval.videos=false | eval.videos=false leaves nothing to judge: single steps are measured by ptq.py
eval 'prompts.texts=["a red dog"]' prompts.name=mine | DOG
eval reference=AT/nowhere | no model folder AT/nowhere: give a folder in diffusers layout, a hub id, or tiny
eval qat.steps=1 | there is no key qat.steps
"""
NAMES = {
    "QUOTED": QUOTED, "CHANGED": CHANGED, "NAN": NAN, "DOG": DOG, "WEIGHTS": WEIGHTS,
    "LEARNED": """'qat.data.prompts.texts=["a blue square moving up on a white background"]'""",
}  # fmt: skip


def rows() -> list[tuple[str, str]]:
    found = []
    for line in REFUSED.strip().splitlines():
        for name, text in NAMES.items():
            line = line.replace(name, text)
        words, _, said = line.partition(" | ")
        found.append((words, said))
    return found


def spoil(path: Path) -> None:
    tensors = load_file(path)
    tensors["blocks.3.ffn.net.2.weight"][5, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the inputs name: damaged models, and folders and files that are none."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").touch()
    (folder / "empty").mkdir()
    (folder / "home").mkdir()
    (folder / "home" / "letter.txt").touch()
    damage: dict[str, Callable[[Path], object]] = {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
        "missing": lambda path: (path.parent.parent / "tokenizer" / "tokenizer_config.json").unlink(),
        "changed": flip,
        "nan": spoil,
    }
    for name, harm in damage.items():
        model = shutil.copytree(short(), folder / name)
        if name != "nan":  # a source that came without sums
            seal(model)
        harm(model / "transformer" / WEIGHTS)
    return folder


@pytest.mark.parametrize(("row", "said"), rows(), ids=[row for row, _ in rows()])
def test_bad_input_gets_one_line_and_leaves_nothing(
    row: str,
    said: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *words = shlex.split(row.replace("AT/", f"{places}/"))
    asked = {word.split("=")[0] for word in words}
    usual = [f"cache={CACHE}", f"hydra.run.dir={tmp_path / 'run'}", "tracker=none"]
    usual += [f"model.path={short()}", *QUICK] if not asked & {"model", "run"} else []
    if program == "train":
        usual += ["qat.steps=3", "qat.warmup=1", "qat.batch=4", TWO]
    assert run(monkeypatch, program, *words, *(word for word in usual if word.split("=")[0] not in asked)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if " elapsed, " not in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: " + said.replace("AT/", f"{places}/"))
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert [path.name for path in (places / "home").iterdir()] == ["letter.txt"]
