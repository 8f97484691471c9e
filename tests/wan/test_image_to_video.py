"""Image-to-video models: with an encoder of pictures (Wan2.1) and without (Wan2.2), each video from its own picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.jobs import ptq, run
from tests.test_config import composed
from tests.wan.variants import first_frame, image_to_video
from wanquant import load_pipeline, quantize_
from wanquant.evaluate.single_steps import measured_now, record
from wanquant.ptq.estimate import count_videos, estimate_resources
from wanquant.ptq.plan import resolve
from wanquant.quant import QuantConfig
from wanquant.quant.attention import QuantAttention
from wanquant.quant.scheme import parse
from wanquant.runs.cache import Cache
from wanquant.runs.files import sum_of_file
from wanquant.runs.run import read_result
from wanquant.wan.cached import CachedPipeline
from wanquant.wan.checkpoints.checkpoint import quantized_linears
from wanquant.wan.config import GenerationConfig, ModelConfig, Picture
from wanquant.wan.families import FOLDS, folds_of
from wanquant.wan.generate import Position, generate, initial_noise, open_picture
from wanquant.wan.products import quick_products

CPU = torch.device("cpu")
TEXTS = ["a red circle moving right on a black background", "a blue square moving up on a white background"]
SETTINGS = GenerationConfig(32, 48, 5, 2, 2.0, 3.0, 512, 8)
TENSORS = "checkpoint/transformer/diffusion_pytorch_model.safetensors"
ADDED = ["attn2.add_k_proj", "attn2.add_v_proj"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    paths = {text: first_frame(tmp_path_factory.mktemp("pictures"), text) for text in TEXTS}
    return {text: Picture(path, sum_of_file(path)) for text, path in paths.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_to_video(tmp_path_factory.mktemp("model") / "i2v")


def words(model: Path, pictures: dict[str, Picture], folder: Path, **images: list[str]) -> list[str]:
    """A whole run, which measures one text and calibrates on another."""
    given = {"prompts": [str(pictures[TEXTS[0]].path)], "calib": [str(pictures[TEXTS[1]].path)], **images}
    found = [f"model.path={model}", "tracker=none", "protect=ends", f"hydra.run.dir={folder}", "model.other_frames=[]"]
    found += [f"{group}.images={json.dumps(paths)}" for group, paths in given.items() if paths]
    found += [f'{group}.texts=["{text}"]' for group, text in zip(("prompts", "calib"), TEXTS, strict=True)]
    sizes = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "max_text_length": 512}
    return [*found, "eval.noise_floor=false", *(f"model.generation.{name}={size}" for name, size in sizes.items())]


@pytest.mark.slow
def test_a_run_and_its_evaluation(
    model: Path,
    pictures: dict[str, Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Quantized with the linears for pictures, saved as a conversion from files to files makes it, and judged again on
    the run's own picture, as long as it is what it was."""
    folder, shown = tmp_path / "run", tmp_path / "shown.png"
    shutil.copy(pictures[TEXTS[0]].path, shown)
    cache = f"cache={tmp_path / 'cache'}"
    assert ptq(monkeypatch, *words(model, pictures, folder, prompts=[str(shown)]), cache) == 0
    result = read_result(folder)
    converted = [row["name"] for row in result["modules"] if row["status"] == "converted"]
    assert {f"blocks.1.{name}" for name in ADDED} < set(converted)
    assert len(converted) == 12
    assert result["pictures"][TEXTS[0]]["sha256"] == pictures[TEXTS[0]].sha256
    assert result["metrics"]["step_sqnr"]["mean"] < 100
    pipe = load_pipeline(folder / "checkpoint", "cpu")
    assert len(quantized_linears(pipe.transformer)) == 12
    assert pipe.image_encoder is not None
    plain = [word for word in words(model, pictures, tmp_path / "converted") if "prompts" not in word]
    plain = [word for word in plain if "calib" not in word]
    assert ptq(monkeypatch, "mode=convert", *plain, cache) == 0
    made, wanted = (load_file(tmp_path / name / TENSORS) for name in ("converted", "run"))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    again = [f"run={folder}", "prompts=own", "tracker=none", cache, "eval.noise_floor=false", "model.device=cpu"]
    assert run(monkeypatch, "eval", *again, "prompts.seeds=[1]") == 0
    (entry,) = read_result(folder)["evaluations"].values()
    assert entry["pairs"] == 1
    assert entry["metrics"]["psnr"]["n"] == 1
    shutil.copy(pictures[TEXTS[1]].path, shown)
    assert run(monkeypatch, "eval", *again, "prompts.seeds=[2]") == 1
    assert "shown.png is not the picture that this run's video of" in capsys.readouterr().err


def test_each_video_starts_from_its_own_picture(model: Path, pictures: dict[str, Picture]) -> None:
    """Cut to the video's size; the latents are those that the pipeline makes by itself, and of another not."""
    pipe, pair = load_pipeline(model, "cpu"), (TEXTS[0], 0)
    found = generate(pipe, [pair, (TEXTS[1], 0)], SETTINGS, decode=False, pictures=pictures)
    image = open_picture(pictures[TEXTS[0]], SETTINGS)
    assert image.size == (48, 32)
    with quick_products(CPU):
        alone = pipe(
            image=image,
            prompt=TEXTS[0],
            negative_prompt="",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=2.0,
            latents=initial_noise(pipe, 0, SETTINGS),
            output_type="latent",
        ).frames
    assert torch.equal(found[0].latents, alone[0])
    swapped = {TEXTS[0]: pictures[TEXTS[1]]}
    assert not torch.equal(generate(pipe, [pair], SETTINGS, decode=False, pictures=swapped)[0].latents, alone[0])


def test_single_steps_are_replayed_with_their_picture(
    model: Path, pictures: dict[str, Picture], tmp_path: Path
) -> None:
    """Bit for bit; and the cache keeps what was made from one picture apart from what was made from another."""

    def pipeline(shown: dict[str, Picture]) -> CachedPipeline:
        config = ModelConfig(generation=SETTINGS)
        return CachedPipeline(load_pipeline(model, "cpu"), config, "i2v", CPU, Cache(tmp_path), shown)

    made = pipeline(pictures)
    (along,) = record(made, [(TEXTS[0], 0)], 2, alone=True)
    assert (measured_now(along, lambda: None).decibels == 100.0).all()
    quantize_(made.transformer, QuantConfig(), [0, 2])
    assert (measured_now(along, lambda: None).decibels < 100.0).all()
    other = pipeline({TEXTS[0]: pictures[TEXTS[1]]})
    assert other.signature("latents", pairs=[(TEXTS[0], 0)]) != made.signature("latents", pairs=[(TEXTS[0], 0)])
    copied = pipeline({TEXTS[0]: pictures[TEXTS[0]], TEXTS[1]: pictures[TEXTS[0]]})
    assert copied.signature("latents", pairs=[(TEXTS[0], 0)]) == made.signature("latents", pairs=[(TEXTS[0], 0)])


def test_without_an_encoder_the_picture_comes_beside_the_noise(pictures: dict[str, Picture], tmp_path: Path) -> None:
    """As in Wan2.2; the text may then be of any length."""
    pipe = load_pipeline(image_to_video(tmp_path / "plain", encoder=False), "cpu")
    assert pipe.image_encoder is None
    settings, position = GenerationConfig(32, 48, 5, 2, 2.0, 3.0, 64, 8), Position()
    two = [pictures[text] for text in TEXTS]
    a, b = (
        generate(pipe, [(TEXTS[0], 0)], settings, decode=False, position=position, pictures={TEXTS[0]: each})[0]
        for each in two
    )
    assert position.step == 1
    assert not torch.equal(a.latents, b.latents)


def test_attention_to_a_picture_is_quantized_apart(model: Path) -> None:
    """Of operands on the grid, it is what diffusers' own makes of them, but for the rounding."""
    torch.manual_seed(1)
    block = load_pipeline(model, "cpu").transformer.blocks[0]
    attn = block.attn2
    hidden, source = torch.randn(1, 6, 48).bfloat16(), torch.randn(1, 5 + 512, 48).bfloat16()
    with torch.no_grad():
        plain = attn(hidden, source)
        attn.set_processor(QuantAttention(parse(QuantConfig(attention="qkv"))))
        rounded = attn(hidden, source)
        blind = attn(hidden, source[:, 5:])
    error = (rounded - plain).float().norm() / plain.float().norm()
    assert 0 < error < 0.05
    assert (blind - plain).float().norm() > 3 * (rounded - plain).float().norm()


def test_smoothing_does_not_fold_where_a_pictures_values_are_added(model: Path) -> None:
    folds = folds_of(load_pipeline(model, "cpu").transformer)
    assert folds == {reader: writer for reader, writer in FOLDS.items() if reader != "attn2.to_out.0"}


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ({"prompts": []}, "prompts.images has 0 pictures for 1 texts: give the first frame of each text"),
        ({"calib": ["a.png", "b.png"]}, "calib.images has 2 pictures for 1 texts"),
        ({"prompts": ["no.png"]}, "prompts.images: no.png: No such file or directory"),
        ({"prompts": [__file__]}, "it is no picture that can be read"),
    ],
)
def test_what_is_wrong_with_pictures_is_told(
    images: dict[str, list[str]],
    told: str,
    model: Path,
    pictures: dict[str, Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ptq(monkeypatch, *words(model, pictures, tmp_path / "run", **images)) == 1
    assert told in capsys.readouterr().err


def test_what_a_model_cannot_take_is_told(
    model: Path,
    pictures: dict[str, Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = words(model, pictures, tmp_path / "run")
    text = [word for word in asked if not word.startswith("model.path")]
    assert ptq(monkeypatch, *text) == 1
    assert "calib.images: this model makes videos from text alone" in capsys.readouterr().err
    short = [word for word in asked if not word.startswith("model.generation.max_text_length")]
    assert ptq(monkeypatch, *short, "model.generation.max_text_length=64") == 1
    assert "max_text_length=64: must be 512 for a transformer that attends to pictures" in capsys.readouterr().err
    assert run(monkeypatch, "train", *asked, "qat=on", f"cache={tmp_path / 'cache'}") == 1
    assert "train.py trains text-to-video models" in capsys.readouterr().err
    assert ptq(monkeypatch, "mode=convert", *[w for w in asked if "prompts" not in w and "calib" not in w]) == 0
    assert read_result(tmp_path / "run")["conversion"]["converted"] == 12


@pytest.mark.parametrize(
    ("preset", "parameters", "linears", "transformers"),
    [
        ("wan2.1-i2v-14b-480p", 16.40e9, 12 * 35, 1),
        pytest.param("wan2.2-i2v-a14b", 28.58e9, 10 * 70, 2, marks=pytest.mark.slow),
    ],
)
def test_it_is_planned_at_the_true_shape(
    preset: str, parameters: float, linears: int, transformers: int, tmp_path: Path
) -> None:
    path = tmp_path / "frame.png"
    Image.new("RGB", (832, 480)).save(path)
    images = [f'{group}.images=["{path}"]' for group in ("prompts", "calib")]
    texts = [
        "prompts.texts=[one]",
        "calib.texts=[other]",
        "eval.videos=false",
        "model.device=cpu",
        "model.generation.num_frames=5",
    ]
    plan = resolve(composed(f"model={preset}", *images, *texts))
    estimate = estimate_resources(plan, count_videos(plan))
    assert len(estimate.converted) == linears
    assert len(plan.model.protected or ()) == 5 * transformers
    assert ("blocks.2.attn2.add_k_proj" in estimate.converted) == (transformers == 1)
    assert estimate.parameters == pytest.approx(parameters, rel=1e-3)
    encoder = 4 * 632e6 if transformers == 1 else 0  # of pictures, in float32
    assert estimate.others == pytest.approx(2 * 5.68e9 + 4 * 127e6 + encoder, rel=0.01)
    assert estimate.added > 2 * estimate.parameters + estimate.others
