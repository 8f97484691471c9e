"""The choice of where weights wait, from what is needed and what is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import QUICK, ROOT, TWO, run, short
from tests.qat.short import overrides
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.find import find_folder
from wanquant.wan.checkpoints.model_files import ModelFiles
from wanquant.wan.config import GenerationConfig
from wanquant.wan.resources import choice, placement
from wanquant.wan.resources.estimate import ResourceEstimate, VideoCounts
from wanquant.wan.resources.offload import Needed, Sizes, choose_way, larger, on_host, ways_of

GB = 10**9
#: Of ``ptq.py model=wan2.1-t2v-14b protect=boundary`` at 480p with 81 frames, three videos held.
REAL = Sizes(
    transformers=28_576_983_168,
    around=465_438_848,
    block=702_788_608,
    text_encoder=11_361_820_672,
    text_layers=2_134_000_000,
    vae=507_570_124,
    denoising=4_068_988_868,
    decoding=8_166_976_512,
    videos=1_164_533_760,
)


@pytest.mark.parametrize(
    ("card", "host", "way"),
    [
        (16, 128, "group"),
        (16, 32, "disk"),
        (24, 64, "group"),
        (24, 32, "disk"),
        (32, 64, "group"),
        (32, 16, "disk"),
        (80, 64, "none"),
        (80, 16, "none"),
        (8, 128, None),
        (24, 8, None),
    ],
)
def test_the_way_follows_from_what_is_free(card: int, host: int, way: str | None) -> None:
    assert choose_way(ways_of(REAL), card * GB, host * GB) == way


def test_what_each_way_needs() -> None:
    ways = ways_of(REAL)
    assert ways["none"].card == 28_576_983_168 + 11_361_820_672 + 507_570_124 + 8_166_976_512
    assert ways["group"].card == ways["disk"].card == 507_570_124 + 8_166_976_512  # decoding takes the most
    short = dataclasses.replace(REAL, decoding=0)
    assert ways_of(short)["group"].card == 507_570_124 + 465_438_848 + 2 * 702_788_608 + 4_068_988_868
    copied = dataclasses.replace(short, beside=14 * GB, beside_block=350_000_000)
    assert ways_of(copied)["group"].card == ways_of(short)["group"].card + 350_000_000
    assert ways_of(copied)["group"].host == ways_of(short)["group"].host + 14 * GB
    assert ways_of(copied)["disk"].host == ways_of(short)["disk"].host
    cpu = on_host(REAL)
    assert cpu["none"] == cpu["group"]
    assert cpu["disk"].card == 507_570_124 + REAL.text_encoder
    more = larger(ways, {"none": Needed(60 * GB, 1), "disk": Needed(1, 20 * GB)})
    assert more == {"none": Needed(60 * GB, REAL.videos), "disk": Needed(ways["disk"].card, 20 * GB)}


def test_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ways_of(REAL)
    line = choice.told("group", ways, 24 * GB, 64 * GB)
    assert line == (
        "offload     group: weights wait on the host, brought block by block; 8.67 GB of 24 GB free, on the host "
        "43.2 GB of 64 GB free; all of it on the device 48.6 GB"
    )
    assert "on the device; 48.6 GB of 80 GB free" in choice.told("none", ways, 80 * GB, 64 * GB)

    how = (parse(QuantConfig()), (), (), GenerationConfig(), VideoCounts(1, 1), 1, torch.device("cuda"))
    needs = ResourceEstimate(Path(), *how)
    needs.__dict__["ways"] = ways
    monkeypatch.setattr(choice, "free_memory", lambda device: (8 * GB, 64 * GB))
    with pytest.raises(ValueError, match=r"model.offload=auto: no way fits, the least needs 8.67 GB of 8 GB free"):
        choice.choose(needs, "auto")
    assert choice.choose(needs, "disk")[0].offload == "disk"  # asked for by name it is tried
    monkeypatch.setattr(choice, "free_memory", lambda device: (24 * GB, 64 * GB))
    assert choice.choose(needs, "auto")[0].offload == "group"
    with pytest.raises(ValueError, match="no way fits"):
        choice.choose(needs, "auto", {"none": Needed(30 * GB, 0)})  # a training of all blocks
    # On the host nothing is refused: it may swap.
    host = ResourceEstimate(Path(), *how[:-1], torch.device("cpu"))
    host.__dict__["ways"] = ways
    monkeypatch.setattr(choice, "free_memory", lambda device: (8 * GB, 8 * GB))
    chosen, line = choice.choose(host, "auto")
    assert chosen.offload == "none"
    assert line.startswith("offload     no way fits: model.offload=disk, the least, needs 8.67 GB of 8 GB free; ")


@pytest.mark.slow  # decoding at full size, op by op
def test_the_true_size_is_that() -> None:
    folder = find_folder("Wan-AI/Wan2.1-T2V-14B-Diffusers", shapes_only=True)
    how = (parse(QuantConfig()), (0, 1, 37, 38, 39), (), GenerationConfig(), VideoCounts(2, 1, 3, 3), 1)
    found = ResourceEstimate(ModelFiles.of(folder), *how, torch.device("cuda")).ways
    for name, needed in ways_of(REAL).items():
        assert (found[name].card, found[name].host) == pytest.approx((needed.card, needed.host), rel=0.02)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """All that is measured; times and memory are not."""
    kept = ("metrics", "gates", "overflow", "block_sqnr", "single_steps", "protect", "conversion", "over_untrained")
    found = {name: result[name] for name in kept if name in result}
    assert len(found) > 3
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["group", "disk"])
def test_a_job_gives_the_same_numbers(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks are chosen by copies that run beside them, replaced and put back; ``eval.py`` loads what came of it."""
    monkeypatch.setattr(placement, "LARGE", 1 << 10)
    found = []
    for asked in ("none", way):
        words = (f"model.path={short(4)}", *QUICK, TWO, "protect=auto", "protect.budget=1", "eval.block_sqnr=true")
        more = ("eval.noise_floor=false", "tracker=none", f"cache={tmp_path / f'cache-{asked}'}")
        folder = tmp_path / asked
        assert run(monkeypatch, "ptq", f"hydra.run.dir={folder}", f"model.offload={asked}", *words, *more) == 0
        monkeypatch.chdir(ROOT)
        judged = (f"run={folder}", "model.device=cpu", "prompts.seeds=[5]", "prompts=own", f"model.offload={asked}")
        assert run(monkeypatch, "eval", *judged, more[-1], "tracker=none", f"hydra.run.dir={tmp_path / 'eval'}") == 0
        result = read_result(folder)
        found.append((figures(result), {k: v["metrics"] for k, v in result["evaluations"].items()}))
    assert found[0] == found[1]
    assert f"offload     {way}: weights wait" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "LARGE", 1 << 10)
    found = []
    for asked in ("none", "disk"):
        words = overrides(short(4), tmp_path / f"cache-{asked}", "qat.scope=blockwise", "qat.samples=16")
        assert run(monkeypatch, "train", f"hydra.run.dir={tmp_path / asked}", f"model.offload={asked}", *words) == 0
        result = read_result(tmp_path / asked)
        found.append({**figures(result), "blocks": result["training"]["blocks"]})
    assert found[0] == found[1]


def test_all_blocks_are_not_trained_beside_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = overrides(short(4), tmp_path / "cache", "qat.scope=all", "model.offload=group", "dry_run=true")
    assert run(monkeypatch, "train", f"hydra.run.dir={tmp_path / 'run'}", *words) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].endswith("choose qat.scope=blockwise, or model.offload=none")
    assert run(monkeypatch, "ptq", "model.offload=grup", f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert "did you mean group?" in capsys.readouterr().err
