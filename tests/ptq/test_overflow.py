"""What falls beyond a format's range is told by side and by linear, of a quantization and of a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import CACHE, run, short
from wanquant.runs.reports.report import summary
from wanquant.runs.run import read_result

OUTLIERS = ["model.outliers.blocks=[0]", "quant=challenge_direct", "quant.overflow=saturate", "protect=none"]
SMALL = [
    'prompts.texts=["a red circle moving right on a black background"]', "prompts.seeds=[0]",
    "model.generation.steps=1", "model.generation.num_frames=5", "model.other_frames=[]",
    "eval.videos=false", "tracker=none", "checkpoint=false",
]  # fmt: skip
#: Nothing but the output's error is learned from, of one prompt, in one step.
TRAINED = ["qat=norms", "qat.steps=1", "qat.warmup=0", "qat.batch=1", "qat.data.prompts.seeds=[1]"]


@pytest.mark.parametrize("program", ["ptq", "train"])
def test_weights_beyond_the_range_are_told(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = 'qat.data.prompts.texts=["a green circle moving left on a gray background"]'
    further = [*TRAINED, learned] if program == "train" else []
    words = [f"model.path={short(2)}", "model.language=scenes", *OUTLIERS, *SMALL, *further, f"cache={CACHE}"]
    assert run(monkeypatch, program, *words, f"hydra.run.dir={tmp_path / 'run'}") == 0
    result = read_result(tmp_path / "run")
    weights, inputs = result["overflow"]["weights"], result["overflow"]["inputs"]
    assert set(weights["modules"]) == {"blocks.0.attn1.to_v", "blocks.0.attn2.to_v"}
    assert weights["elements"] == sum(weights["modules"].values()) > 1000
    assert all(name.startswith("blocks.") for name in inputs["modules"])
    told = f"{weights['elements']:,} elements of weights, in 2 linears"
    assert told in (tmp_path / "run" / "report.html").read_text()
    assert told in summary(result, tmp_path)
    # Results of the first release have no sides.
    result["overflow"] = {"elements": 1234, "modules": {"blocks.0.ffn.net.2": 1234}}
    assert "beyond the range: 1,234 elements, in 1 linears\n" in summary(result, tmp_path)
