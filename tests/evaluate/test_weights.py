"""Where judges' weights are, and what they have to be."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.evaluate import judges
from wanquant import doctor
from wanquant.evaluate import fidelity
from wanquant.evaluate.judges import examine, perceptual, weights
from wanquant.evaluate.judges.weights import Weight


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is written and read here, VBench itself not being asked."""
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "vbench"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(weight: Weight, content: bytes) -> None:
    weight.path.parent.mkdir(parents=True, exist_ok=True)
    weight.path.write_bytes(content)


def known(monkeypatch: pytest.MonkeyPatch, *table: Weight) -> None:
    monkeypatch.setattr(weights, "WEIGHTS", table)


def test_the_places_are_those_of_vbench_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.vbench_root() == tmp_path / "vbench"
    assert weights.torch_root() == Path(torch.hub.get_dir())
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.delenv("VBENCH_CACHE_DIR")
    assert weights.torch_root() == Path(torch.hub.get_dir())
    assert weights.vbench_root() == Path.home() / ".cache" / "vbench"
    assert {name for weight in weights.WEIGHTS for name in weight.used_by} <= {
        *judges.vbench.DIMENSIONS,
        weights.LPIPS,
        weights.RAFT,
    }


def test_what_is_published_is_checked_by_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("a.pth", "https://nowhere/a.pth", ("d",), sha256(b"right"))
    known(monkeypatch, weight)
    with pytest.raises(
        ValueError, match=r"weights are missing: .* `python -m wanquant\.doctor fetch d` gets them .*a\.pth"
    ):
        weights.checked(["d"])
    put(weight, b"wrong")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* fetch it again, or mark the scores as meaningless"):
        weights.checked(["d"])
    assert weights.checked(["d"], foreign=True) == {"a.pth": sha256(b"wrong")}
    put(weight, b"right")
    assert weights.find(weight).state == "published"
    assert weights.checked(["d"]) == {"a.pth": sha256(b"right")}


def test_what_has_no_published_sum_goes_on_record_at_first_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight("b/b.pth", "https://nowhere/b.pth", ("d",))
    known(monkeypatch, weight)
    put(weight, b"first")
    assert weights.find(weight).state == "new"
    weights.checked(["d"])
    assert weights.find(weight).state == "recorded"
    assert (weights.vbench_root() / weights.RECORD).read_text() == f"{sha256(b'first')}  b/b.pth\n"
    put(weight, b"second")
    with pytest.raises(ValueError, match="has the SHA-256"):
        weights.checked(["d"])


def test_fetching_from_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("models/one.pth", b"one")
        archive.writestr("repository-main/hubconf.py", "x = 1\n")
    url = (tmp_path / "x.zip").as_uri()
    file = Weight("m/one.pth", url, ("d",), sha256(b"one")[:8], member="models/one.pth")
    folder = Weight("repository", f"{url}#folder", ("e",), member="repository-main/")
    wrong = Weight("w/one.pth", f"{url}#wrong", ("f",), "0123", member="models/one.pth")
    known(monkeypatch, file, folder, wrong)
    assert examine.fetch(["d", "e"])
    assert file.path.read_bytes() == b"one"
    assert (folder.path / "hubconf.py").read_text() == "x = 1\n"
    assert weights.find(folder).state == "recorded"
    (folder.path / "hubconf.py").write_text("x = 2\n")
    assert weights.find(folder).state == "other"
    assert not examine.fetch(["f"])
    assert not wrong.path.exists()
    with pytest.raises(ValueError, match="weights are known of d, e, f"):
        examine.fetch(["g"])


def test_what_is_on_this_disk_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's vocabulary comes with its package; DINO's weights are wanted in two places."""
    vocabulary = next(weight for weight in weights.WEIGHTS if weight.name.endswith("txt.gz"))
    weights.fetch(vocabulary)
    assert weights.find(vocabulary).state == "recorded"
    one, two = (weight for weight in weights.WEIGHTS if weight.url == judges.DINO)
    put(one, b"dino")
    weights.fetch(two)
    assert two.path.read_bytes() == b"dino"


def test_the_doctor_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = next(weight for weight in weights.WEIGHTS if weight.name == "clip_model/ViT-B-32.pt")
    put(weight, b"not it")
    monkeypatch.setattr(sys, "argv", ["wanquant doctor"])
    doctor.main()
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert lines["vbench"].split()[1] == judges.vbench.VERSION
    assert lines["temporal_flickering"].endswith("ready")
    assert "needs amt_model/amt-s.pth" in lines["motion_smoothness"]
    assert "NOT what it should be" in lines[weight.name]
    assert "missing" in lines["amt_model/amt-s.pth"]
    assert "doctor fetch` gets what is missing" in said
    assert not (tmp_path / "vbench" / weights.RECORD).exists()
    monkeypatch.setattr(sys, "argv", ["wanquant doctor", "fetch", "no"])
    with pytest.raises(SystemExit, match="1"):
        doctor.main()
    assert capsys.readouterr().err.startswith("error: weights are known of motion_smoothness")


def test_lpips_where_its_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert perceptual.settled("auto") == "off"
    assert perceptual.distance("auto", torch.device("cpu")) is None
    with pytest.raises(ValueError, match="fetch lpips"):
        perceptual.settled("on")
    judges.alexnet()
    with pytest.raises(ValueError, match="has the SHA-256"):  # random weights are not the published ones
        perceptual.distance("auto", torch.device("cpu"))
    (published,) = weights.needed([weights.LPIPS])
    actual = weights.sum_of(published.path)
    known(monkeypatch, Weight(published.name, published.url, published.used_by, actual, root="torch"))
    distance = perceptual.distance("on", torch.device("cpu"))
    assert distance is not None
    video = torch.rand(18, 64, 64, 3).numpy()
    assert distance(video, video) == pytest.approx(0.0, abs=1e-6)
    assert distance(video, 1 - video) > 0.01
    assert distance(video, video * float("nan")) != distance(video, video)
    assert perceptual.distance("off", torch.device("cpu")) is None
    by_frame = [distance(video[i : i + 1], 1 - video[i : i + 1]) for i in range(18)]
    assert distance(video, 1 - video) == pytest.approx(sum(by_frame) / 18, rel=1e-4)
    sample = fidelity.Sample("p", 0, torch.randn(16, 5, 8, 8), video)
    assert fidelity.compare(sample, sample, distance)["lpips"] == pytest.approx(0.0, abs=1e-6)
