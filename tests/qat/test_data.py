"""What is trained on: the same rows whoever asks for them, and what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs import short
from tests.qat.test_job import make_videos
from wanquant import load_pipeline
from wanquant.evaluate.prompts import PromptsConfig, pairs
from wanquant.qat.config import DataConfig
from wanquant.qat.data import Batch, Trajectories, Videos, contents, make_source, shuffled_order
from wanquant.runs.cache import Cache
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.config import GenerationConfig, ModelConfig
from wanquant.wan.data import encode_video, encoded, fit, read_latents, read_video
from wanquant.wan.generate import decode_video
from wanquant.wan.tiny import all_scenes, draw

SETTINGS = GenerationConfig(64, 64, 17, 2, 2.0, 3.0, 64, 8)
PAIRS = [("a red circle moving right on a black background", 0), ("a blue square moving up on a white background", 3)]

BOTH = DataConfig(prompts=PromptsConfig(texts=[text for text, _ in PAIRS]))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CachedPipeline:
    pipe = load_pipeline(short(), device="cpu")
    model = ModelConfig(generation=SETTINGS, batch=2)
    return CachedPipeline(pipe, model, "tiny", torch.device("cpu"), Cache(tmp_path_factory.mktemp("cache")))


def test_everything_once_then_again_in_another_order() -> None:
    taken = [place for step in range(4) for place in shuffled_order(5, 1, step * 3, 3)]
    assert sorted(taken[:5]) == sorted(taken[5:10]) == list(range(5))
    assert taken[:5] != taken[5:10]
    assert shuffled_order(5, 2, 0, 5) != shuffled_order(5, 1, 0, 5)
    assert len(shuffled_order(3, 0, 0, 8)) == 8


def same(a: Batch, b: Batch, rows: range) -> bool:
    parts = [(getattr(a, name), getattr(b, name)) for name in ("noisy", "timestep", "text", "velocity", "output")]
    return all(x is None or torch.equal(x[rows.start : rows.stop], y) for x, y in parts)


def videos(pipeline: CachedPipeline, drop: float = 0.1) -> Videos:
    latents = [torch.randn(16, 5, 8, 8) for _ in range(3)]
    captions = [PAIRS[0][0], PAIRS[1][0], PAIRS[0][0]]
    return Videos(captions, latents.__getitem__, pipeline.embedding, "", 0, 3.0, drop)


def test_a_part_of_the_rows_is_what_it_is_in_the_whole(pipeline: CachedPipeline) -> None:
    for source in (videos(pipeline), make_source(pipeline, BOTH, pairs(BOTH.prompts), 0)):
        whole = source.batch(2, 6, range(6))
        for rows in (range(3), range(3, 6), range(5, 6)):
            assert same(whole, source.batch(2, 6, rows), rows)
        assert not torch.equal(source.batch(3, 6, range(6)).noisy, whole.noisy)


def test_noise_levels_are_those_of_the_flow_shift(pipeline: CachedPipeline) -> None:
    """One in each part of the batch, x = (1 - sigma) clean + sigma noise, v = noise - clean."""
    source = videos(pipeline, drop=0.5)
    batch = source.batch(0, 12, range(12))
    assert batch.velocity is not None
    sigma = batch.timestep / 1000
    uniform = sigma / (3 - 2 * sigma)  # the shift, undone
    assert sorted((12 * uniform).floor().int().tolist()) == list(range(12))
    clean = batch.noisy - sigma.view(-1, 1, 1, 1, 1) * batch.velocity
    known = torch.stack([source.latents(i) for i in range(3)])
    assert all((known - row).flatten(1).norm(dim=1).min() < 1e-3 for row in clean)
    dropped = sum(torch.equal(row, pipeline.embedding("")) for row in batch.text)
    assert 1 <= dropped <= 11


def test_a_recording_is_what_the_model_says_again(pipeline: CachedPipeline) -> None:
    source = make_source(pipeline, BOTH, pairs(BOTH.prompts), 0)
    assert isinstance(source, Trajectories)
    assert len(source) == 2 * 2 * 2  # pairs, steps, branches
    batch = source.of(range(8))
    assert torch.equal(batch.text[0], pipeline.embedding(PAIRS[0][0]))
    assert torch.equal(batch.text[1], pipeline.embedding(""))
    assert torch.equal(batch.noisy[0], batch.noisy[1])
    assert batch.output is not None
    with torch.no_grad():
        again = pipeline.pipe.transformer(batch.noisy, batch.timestep, batch.text, return_dict=False)[0]
    torch.testing.assert_close(again.float(), batch.output.float(), rtol=0.1, atol=0.1)  # other batches round otherwise
    assert pipeline.pipe.transformer.training is False
    # What it had made by the way, is not made again.
    recorded = pairs(BOTH.prompts)
    batches = [recorded[first : first + 2] for first in range(0, len(recorded), 2)]
    assert all(pipeline.cache.has("latents", pipeline.signature("latents", pairs=batch)) for batch in batches)
    kept, expected = pipeline.latents("known", recorded)[0], pipeline.generate(recorded, lambda: None, decode=False)
    assert all(torch.equal(a, b.latents) for a, b in zip(kept, expected, strict=True))


def test_a_video_is_encoded_as_the_pipeline_has_it(pipeline: CachedPipeline, tmp_path: Path) -> None:
    scene = all_scenes()[7]
    frames = torch.from_numpy(draw(scene, np.random.default_rng(0))).float() / 255
    latents = encode_video(pipeline.pipe, frames)
    assert latents.shape == (16, 5, 8, 8)
    error = torch.from_numpy(decode_video(pipeline.pipe, latents)) - frames
    assert -10 * error.square().mean().log10() > 25
    folder = make_videos(tmp_path / "films")
    files = encoded(pipeline, [folder / "0.mp4", folder / "1.mp4"])
    read = read_latents(files[0])
    assert torch.equal(read, encode_video(pipeline.pipe, read_video(folder / "0.mp4", SETTINGS)))
    # The same video under another name is not encoded again.
    (folder / "copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    assert encoded(pipeline, [folder / "copy.mp4"])[0] == files[0]


def test_a_video_is_brought_to_the_models_size_and_rate(tmp_path: Path) -> None:
    frames = torch.arange(8).view(1, 1, 8, 1).expand(3, 4, 8, 3) / 8.0
    cut = fit(frames, 2, 2)
    assert cut.shape == (3, 2, 2, 3)
    torch.testing.assert_close(cut[0, 0, :, 0], torch.tensor([2.5, 4.5]) / 8, rtol=0, atol=0.06)
    assert torch.equal(fit(frames, 4, 8), frames)
    from wanquant.runs.pictures import write_mp4

    moving = np.zeros((32, 64, 64, 3), np.uint8)
    moving += (np.arange(32, dtype=np.uint8) * 7)[:, None, None, None]
    write_mp4(tmp_path / "fast.mp4", moving, 16)
    slow = read_video(tmp_path / "fast.mp4", GenerationConfig(64, 64, 13, 2, 2.0, 3.0, 64, 8))
    steps = slow.mean((1, 2, 3)).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 14 / 255), rtol=0, atol=0.02)  # every second frame
    with pytest.raises(ValueError, match="has 16 frames at 8 a second, and the model takes 17"):
        read_video(tmp_path / "fast.mp4", SETTINGS)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot read the video"):
        read_video(tmp_path / "broken.mp4", SETTINGS)


def test_scenes_are_drawn_once(pipeline: CachedPipeline, monkeypatch: Any) -> None:
    from wanquant.qat import data

    few = [scene for scene in all_scenes() if not scene.held_out][:3]
    monkeypatch.setattr(data, "all_scenes", lambda: few)
    source = make_source(pipeline, DataConfig(source="scenes", videos_per_scene=2), (), 0)
    assert len(source) == 6
    left = make_source(pipeline, DataConfig(source="scenes", videos_per_scene=2), (), 0, [few[1].caption])
    assert len(left) == 4
    assert isinstance(left, Videos)
    assert few[1].caption not in left.captions
    assert isinstance(source, Videos)
    assert torch.equal(left.latents(2), source.latents(4))
    batch = source.batch(0, 2, range(2))
    assert batch.velocity is not None
    assert batch.noisy.shape == (2, 16, 5, 8, 8)


def test_data_are_known_by_what_they_are(tmp_path: Path) -> None:
    folder = make_videos(tmp_path / "films")
    config = DataConfig(source="folder", path=str(folder))
    first = contents(config)
    (tmp_path / "films").rename(tmp_path / "perturbed")
    assert contents(replace(config, path=str(tmp_path / "perturbed" / "metadata.csv"))) == first
    (tmp_path / "perturbed" / "0.mp4").write_bytes(b"another")
    assert contents(replace(config, path=str(tmp_path / "perturbed"))) != first
    named = replace(BOTH, prompts=replace(BOTH.prompts, name="other", by_language={"english": ["x"]}))
    assert contents(named) == contents(BOTH)
