"""LoRA files of every naming, against W + scale · alpha / r · B A by hand; and beside a quantized model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import jobs
from tests.models import wan_transformer
from tests.wan.pair import make_pair
from wanquant import load_pipeline, quantize_
from wanquant.runs.run import read_result
from wanquant.wan.checkpoints.model_files import fingerprint
from wanquant.wan.config import ModelConfig
from wanquant.wan.experts import transformers_in, whole_of
from wanquant.wan.lora import describe_loras, fuse_loras_, load_loras, parse_lora

#: Of two blocks 48 wide: diffusers' names and those of Wan's authors, of every kind of linear.
LINEARS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "proj_out": "head.head",
}
RANK = 4
#: (prefix, whether by the authors' names, dots, endings of A and B)
NAMINGS = {
    "diffusers": ("transformer.", False, ".", ("lora_A.weight", "lora_B.weight")),
    "peft": ("base_model.model.", False, ".", ("lora_A.weight", "lora_B.weight")),
    "original": ("diffusion_model.", True, ".", ("lora_A.weight", "lora_B.weight")),
    "original, down and up": ("diffusion_model.", True, ".", ("lora_down.weight", "lora_up.weight")),
    "kohya": ("lora_unet_", True, "_", ("lora_down.weight", "lora_up.weight")),
}


def key(naming: str, linear: str, ending: str) -> str:
    prefix, original, dot, _ = NAMINGS[naming]
    return f"{prefix}{(LINEARS[linear] if original else linear).replace('.', dot)}.{ending}"


def matrices(model: torch.nn.Module, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    rows, columns = model.get_submodule(linear).weight.shape
    generator = torch.Generator().manual_seed(len(linear))
    return torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)


def written(model: Any, path: Path, naming: str, alpha: float | None, **more: torch.Tensor) -> Path:
    state = dict(more)
    for linear in LINEARS:
        for ending, matrix in zip(NAMINGS[naming][3], matrices(model, linear), strict=True):
            state[key(naming, linear, ending)] = matrix
        if alpha is not None:
            state[key(naming, linear, "alpha")] = torch.tensor(alpha)
    save_file(state, path)
    return path


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("naming", NAMINGS)
def test_what_is_fused_is_the_sum_by_hand(naming: str, alpha: float | None, tmp_path: Path) -> None:
    model = wan_transformer(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = written(model, tmp_path / "a.safetensors", naming, alpha)
    fuse_loras_(model, [f"{path}:0.8"])
    factor = 0.8 * (1 if alpha is None else alpha / RANK)
    for name, tensor in model.state_dict().items():
        linear, _, kind = name.rpartition(".")
        wanted = before[name]
        if linear in LINEARS and kind == "weight":
            a, b = matrices(model, linear)
            wanted = wanted.float() + factor * (b @ a)
            assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, wanted.to(before[name].dtype), rtol=2**-8, atol=1e-6)


def test_whole_differences_are_added(tmp_path: Path) -> None:
    """As lightx2v's files have them beside the matrices: of biases, norms, modulation."""
    model = wan_transformer(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "diffusion_model.blocks.1.self_attn.norm_k.diff": "blocks.1.attn1.norm_k.weight",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
    }
    state = {key: torch.randn(before[name].shape) for key, name in changed.items()}
    save_file(state, tmp_path / "a.safetensors")
    fuse_loras_(model, [f"{tmp_path / 'a.safetensors'}:0.5"])
    wanted = {name: before[name].float() + 0.5 * state[key] for key, name in changed.items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted.get(name, before[name]).to(tensor.dtype), rtol=2**-8, atol=1e-6)


def test_two_files_are_rounded_once(tmp_path: Path) -> None:
    model = wan_transformer(2)
    before = model.blocks[0].attn1.to_q.weight.float()
    paths = [written(model, tmp_path / f"{name}.safetensors", name, None) for name in ("kohya", "diffusers")]
    fuse_loras_(model, [str(paths[0]), f"{paths[1]}:-0.5"])
    a, b = matrices(model, "blocks.0.attn1.to_q")
    found = model.blocks[0].attn1.to_q.weight.float()
    torch.testing.assert_close(found, (before + 0.5 * (b @ a)).bfloat16().float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kept", ["in the file", "beside it"])
def test_an_alpha_for_all_is_found(kept: str, tmp_path: Path) -> None:
    """Where diffusers' ``save_lora_weights`` and peft's ``save_pretrained`` put it."""
    model = wan_transformer(2)
    linear, path = "blocks.0.attn1.to_q", tmp_path / "adapter_model.safetensors"
    before, (a, b) = model.get_submodule(linear).weight.float(), matrices(model, linear)
    state = {key("diffusers", linear, ending): m for ending, m in zip(NAMINGS["diffusers"][3], (a, b), strict=True)}
    text = json.dumps({"transformer.lora_alpha": 12, "transformer.r": RANK, "transformer.alpha_pattern": {}})
    save_file(state, path, {"lora_adapter_metadata": text} if kept == "in the file" else {})
    if kept == "beside it":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": RANK}))
    fuse_loras_(model, [str(path)])
    torch.testing.assert_close(model.get_submodule(linear).weight.float(), before + 3 * (b @ a), rtol=2**-7, atol=1e-6)


def with_(key: str, *shape: int) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({**with_("a.x", 1), **with_("b.y", 1)}, "none of its 2 keys is of this model: a.x, b.y, ..."),
        (
            {
                **with_("transformer.blocks.0.attn1.to_q.diff_b", 48),
                **with_("transformer.blocks.2.attn1.to_q.diff_b", 48),
            },
            r"transformer\.blocks\.2\.attn1\.to_q\.diff_b fits nothing of this model \(1 of 2 keys\)",
        ),
        (
            {**with_("transformer.proj_out.diff_b", 64), **with_("transformer.proj_out.dora_scale", 64)},
            "proj_out.dora_scale fits nothing",
        ),
        (with_("transformer.proj_out.lora_A.weight", 4, 48), "has not both of lora_A and lora_B"),
        (
            {
                **with_("transformer.proj_out.lora_A.weight", 4, 48),
                **with_("transformer.proj_out.lora_B.weight", 60, 4),
            },
            r"are \[4, 48\] and \[60, 4\], for a weight of \[64, 48\]",
        ),
        (with_("transformer.proj_out.diff", 48), r"is \[48\], to be added to \[64, 48\]"),
    ],
)
def test_what_does_not_fit_is_refused(state: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    model = wan_transformer(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        fuse_loras_(model, [str(tmp_path / "a.safetensors")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["a:b.safetensors", "a, b=c.safetensors", "low=a.safetensors", "high=:0.5"])
def test_files_scales_and_transformers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"no tensors")
    assert parse_lora(f"{path}:1") == ("", path, 1.0)
    assert parse_lora(f"{path}:-0.5") == ("", path, -0.5)
    assert parse_lora(f"high={path}:1e-2") == ("high", path, 0.01)
    assert parse_lora(f"low={path}:1") == ("low", path, 1.0)
    if not name.endswith(":0.5"):
        assert parse_lora(str(path)) == ("", path, 1.0)
        assert parse_lora(f"low={path}") == ("low", path, 1.0)
    with pytest.raises(ValueError, match="its scale must be finite"):
        parse_lora(f"high={path}:inf")
    with pytest.raises(ValueError, match=r"no file .*none, give \[high=\|low=\]path\[:scale\]"):
        parse_lora(f"high={tmp_path / 'none'}:1")
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        fuse_loras_(wan_transformer(1), [f"{path}:1"])
    with pytest.raises(ValueError, match="high= is for pipelines of two transformers, and this has one"):
        fuse_loras_(wan_transformer(1), [f"high={path}:1"])


def test_a_name_that_begins_like_a_transformer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "high=a.safetensors").touch()
    assert parse_lora("./high=a.safetensors:2") == ("", Path("high=a.safetensors"), 2.0)


def test_each_of_two_transformers_gets_its_own(tmp_path: Path) -> None:
    """What names none is for both, as users of Wan2.1's files take them for Wan2.2."""
    pipe = load_pipeline(make_pair(tmp_path / "pair", [0, 1], [2, 3]), device="cpu")
    parts, paths = transformers_in(pipe), {name: tmp_path / f"{name}.safetensors" for name in "abc"}
    for path, naming in zip(paths.values(), ("diffusers", "original", "kohya"), strict=True):
        written(parts["transformer"], path, naming, float(len(naming)))
    wanted = {}
    for name, own in (("transformer", f"{paths['a']}:0.5"), ("transformer_2", f"{paths['b']}:-1")):
        alone = copy.deepcopy(parts[name])
        fuse_loras_(alone, [own, f"{paths['c']}:0.25"])
        wanted[name] = alone.state_dict()
    fuse_loras_(whole_of(pipe), [f"high={paths['a']}:0.5", f"low={paths['b']}:-1", f"{paths['c']}:0.25"])
    for name, part in parts.items():
        assert all(torch.equal(tensor, wanted[name][key]) for key, tensor in part.state_dict().items())


def test_a_file_for_one_transformer_has_to_fit_that(tmp_path: Path) -> None:
    pipe = load_pipeline(make_pair(tmp_path / "pair", [0], [1]), device="cpu")
    save_file(with_("transformer.blocks.1.attn1.to_q.diff_b", 128), tmp_path / "a.safetensors")
    for given in (f"low={tmp_path / 'a.safetensors'}", str(tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"none of its 1 keys is of this model: transformer\.blocks\.1"):
            fuse_loras_(whole_of(pipe), [given])


def test_a_quantized_model_is_refused_to_fuse(tmp_path: Path) -> None:
    model = wan_transformer(2)
    path = written(model, tmp_path / "a.safetensors", "kohya", 2.0)
    quantize_(model)
    fuse_loras_(model, [])  # as eval.py does to what it judges
    with pytest.raises(ValueError, match="take the original model"):
        fuse_loras_(model, [str(path)])


@pytest.mark.parametrize("naming", ["diffusers", "original", "kohya"])
def test_beside_a_quantized_model_it_is_a_branch(naming: str, tmp_path: Path) -> None:
    """Also where the file has some linears only, or no alpha, at which diffusers' converter of kohya's names fails."""
    pipe = load_pipeline(jobs.short(2), device="cpu")
    quantize_(pipe.transformer)
    linear, x = "blocks.0.attn1.to_q", torch.randn(5, 128).bfloat16()
    layer = pipe.transformer.get_submodule(linear)
    (a, b), plain = matrices(pipe.transformer, linear), layer(x).float()
    endings = NAMINGS[naming][3]
    state = {key(naming, linear, ending): matrix for ending, matrix in zip(endings, (a, b), strict=True)}
    save_file(state | {key(naming, linear, "alpha"): torch.tensor(2.0)}, tmp_path / "a.safetensors")
    load_loras(pipe, [f"{tmp_path / 'a.safetensors'}:0.5"])
    wanted = plain + 0.5 * 2 / RANK * (x.float() @ a.T @ b.T)
    torch.testing.assert_close(pipe.transformer.get_submodule(linear)(x).float(), wanted, rtol=0.02, atol=0.05)
    pipe.unload_lora_weights()
    assert pipe.transformer.get_submodule(linear) is layer


def test_differences_make_no_branch(tmp_path: Path) -> None:
    pipe = load_pipeline(jobs.short(2), device="cpu")
    save_file(with_("diffusion_model.blocks.0.self_attn.q.diff_b", 128), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"self_attn\.q\.diff_b can only be fused"):
        load_loras(pipe, [str(tmp_path / "a.safetensors")])


def test_the_content_and_scale_count_not_the_name(tmp_path: Path) -> None:
    first, same, other = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, value in ((first, 1.0), (same, 1.0), (other, 2.0)):
        save_file({"transformer.proj_out.diff_b": torch.full((64,), value)}, path)
    asked = [ModelConfig(lora=[each]) for each in (str(first), str(same), str(other), f"{first}:0.5", f"high={first}")]
    asked.append(ModelConfig(lora=[str(first)], lora_fuse=False))
    found = [fingerprint(jobs.short(2), loras=describe_loras(each)) for each in asked]
    assert found[0] == found[1]
    assert len({fingerprint(jobs.short(2)), *found}) == 6
    assert fingerprint(jobs.short(2), loras=describe_loras(ModelConfig(lora_fuse=False))) == fingerprint(jobs.short(2))


def test_the_job_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(with_("lora_unet_blocks_9_self_attn_q.alpha", 1), tmp_path / "a.safetensors")
    assert jobs.ptq(monkeypatch, f"model.lora=[{tmp_path / 'a.safetensors'}]", f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert "none of its 1 keys is of this model: lora_unet_blocks_9_self_attn_q.alpha" in capsys.readouterr().err
    convert = ("mode=convert", f"model.lora=[{tmp_path / 'a.safetensors'}]", f"hydra.run.dir={tmp_path / 'run'}")
    assert jobs.ptq(monkeypatch, *convert) == 1
    assert "leave model.lora out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_job_fuses_it_before_all_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The BF16 side and the quantized one have it; the result and the report say so; the checkpoint holds it."""
    plain = load_pipeline(jobs.short(2), device="cpu").transformer
    state = {"diffusion_model.blocks.0.self_attn.q.diff": torch.randn(128, 128) * 0.1}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    usual = ("prompts.seeds=[0]", jobs.TWO, "protect=none", "protect.blocks=[0]", f"model.path={jobs.short(2)}")
    usual += ("eval.noise_floor=false", *jobs.QUICK, "checkpoint=true", "eval.videos=false")
    asked = (*usual, f"model.lora=['{path}:0.5']", f"hydra.run.dir={tmp_path / 'run'}")
    assert jobs.ptq(monkeypatch, *asked) == 0
    result = read_result(tmp_path / "run")
    (lora,) = result["model"]["lora"]
    assert (lora["file"], lora["scale"]) == ("a.safetensors", 0.5)
    shown = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "a.safetensors was fused into the BF16 weights, times 0.5." in shown
    found = load_pipeline(tmp_path / "run" / "checkpoint", device="cpu").transformer.blocks[0].attn1.to_q.weight
    wanted = plain.blocks[0].attn1.to_q.weight.float() + 0.5 * state["diffusion_model.blocks.0.self_attn.q.diff"]
    assert torch.equal(found, wanted.bfloat16())
    assert result["model"]["fingerprint"] == fingerprint(
        jobs.short(2), loras=describe_loras(ModelConfig(lora=[f"{path}:0.5"]))
    )
