"""Every config composes into its dataclasses, and what is misspelt does not."""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from wanquant.choices import check_choices
from wanquant.config import CONF, name_after_overrides
from wanquant.evaluate.config import EvaluateConfig
from wanquant.evaluate.judges.vbench import DIMENSIONS, check_dimensions
from wanquant.evaluate.prompts import pairs
from wanquant.evaluate.stats import ENOUGH_PAIRS
from wanquant.mistakes import one_line
from wanquant.ptq.config import PTQConfig
from wanquant.qat.plan import resolve_train
from wanquant.qat.train_config import TrainConfig
from wanquant.quant import QuantConfig
from wanquant.quant.scheme import parse, settle
from wanquant.wan import tiny

CHOICES = [
    (group.name, file.stem)
    for group in sorted(Path(CONF).iterdir())
    if group.is_dir()
    for file in sorted(group.glob("*.yaml"))
]
#: The choices but for experiments, one of each group at a time, so that each is composed once.
ROUNDS = [
    [(group, name) for group, name in choices if name]
    for choices in zip_longest(
        *(
            [choice for choice in CHOICES if choice[0] == group]
            for group in sorted({g for g, _ in CHOICES} - {"experiment"})
        ),
        fillvalue=("", ""),
    )
]
#: Experiments, and those that are another for each program, with the program.
EXPERIMENTS = [
    *(("train" if name.startswith("qat_") else "ptq", name) for group, name in CHOICES if group == "experiment"),
    *((folder, file.stem) for folder in ("ptq", "train") for file in Path(CONF, f"of_{folder}").glob("*/*.yaml")),
]


def composed(*overrides: str, script: str = "") -> PTQConfig:
    """A copy: the same is asked for again and again. By train.py where a training is chosen, else by ptq.py."""
    script = script or ("train" if any(override.startswith("qat") for override in overrides) else "ptq")
    return copy.deepcopy(_composed(script, *overrides))


@cache
def _composed(script: str, *overrides: str) -> PTQConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = OmegaConf.to_object(compose(script, list(overrides)))
    assert isinstance(config, PTQConfig)
    return config


@pytest.mark.parametrize("choices", ROUNDS, ids=lambda choices: "-".join(name for _, name in choices))
def test_every_choice_composes_and_is_valid(choices: list[tuple[str, str]]) -> None:
    config = composed(*(f"{group}={name}" for group, name in choices))
    for group, name in choices:
        assert group in ("tracker", "analysis") or getattr(config, group).name == name
    parse(config.quant)
    check_choices(config)
    if config.prompts.name == "own":  # of a run, which ptq.py has none of
        with pytest.raises(ValueError, match=r"prompts\.texts is empty"):
            pairs(config.prompts)
    else:
        assert pairs(config.prompts)
    assert pairs(config.calib)
    check_dimensions(config.eval.dimensions)


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "qat"])
def test_every_training_can_be_planned(name: str) -> None:
    config = composed(f"qat={name}")
    assert isinstance(config, TrainConfig)
    static = name == "delayed" or config.qat.scaling == "delayed"
    quant = composed("quant=static_per_tensor").quant if static else config.quant
    resolve_train(dataclasses.replace(config, quant=quant))


def test_evaluation_composes_and_vbenchs_list_is_whole() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = OmegaConf.to_object(compose("eval", ["prompts=vbench", "eval=vbench_full_custom"]))
    assert isinstance(config, EvaluateConfig)
    assert len(pairs(config.prompts)) == 5 * 944
    assert config.eval.dimensions == list(DIMENSIONS)
    first = dataclasses.replace(config.prompts, dimensions=["temporal_flickering", "human_action"], first=2)
    assert len(pairs(first)) == 5 * 4


@pytest.mark.parametrize(("script", "name"), EXPERIMENTS)
def test_an_experiment_is_a_sweep_over_presets_with_pairs_enough(script: str, name: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        raw = compose(script, [f"experiment={name}"], return_hydra_config=True)
    assert raw.hydra.mode == RunMode.MULTIRUN
    assert raw.hydra.sweep.dir.startswith(f"outputs/{script}/{name}-")
    for group, swept in raw.hydra.sweeper.params.items():
        presets = [preset.strip().strip("'") for preset in swept.split(",")]
        named = "." not in group  # otherwise it is a setting that is swept over, as qat.steps
        assert not named or set(presets) <= {choice for other, choice in CHOICES if other == group}
        for number, preset in enumerate(presets):
            chosen = f"{group}={preset}"
            # What a preset is does not depend on the experiment; what is trained does on all of it.
            whole = script == "train" or number == 0
            config = composed(*([f"experiment={name}"] if whole else []), chosen, script=script)
            assert not named or getattr(config, group).name == preset
            assert not whole or len(pairs(config.prompts)) >= ENOUGH_PAIRS
            assert not whole or script == "train" or len(pairs(config.calib)) >= ENOUGH_PAIRS
            if isinstance(config, TrainConfig):
                resolve_train(config)
    if name == "scale_rules":
        assert set(presets) == {
            choice
            for other, choice in CHOICES
            if other == "quant"
            and composed(f"quant={choice}").quant.format == "hif8"
            and (composed(f"quant={choice}").quant.attention, composed(f"quant={choice}").quant.product)
            == ("off", "fast")
        }


def test_defaults_are_the_librarys() -> None:
    config = composed()
    assert config.quant == QuantConfig()
    assert config.protect.blocks == [0, 1, -3, -2, -1]
    assert len(pairs(config.prompts)) == 5


@pytest.mark.parametrize(
    ("format_", "preset"),
    [
        *((name, f"{name}_w8a8") for name in ("hif8", "e4m3", "e5m2", "int8", "mxfp8")),
        *((name, f"{name}_w4a4") for name in ("mxfp4", "hif4")),
        ("mxfp6", "mxfp6_w6a6"),
        ("int4_g64", "int4_w4a4"),
    ],
)
def test_a_format_brings_its_own_choices(format_: str, preset: str) -> None:
    """By its preset, by its name on the command line, and from Python."""
    library = settle(QuantConfig(format=format_))
    for override in (f"quant={preset}", f"quant.format={format_}"):
        config = settle(composed(override).quant)
        assert dataclasses.replace(config, name=library.name) == library


def test_prompts_follow_the_models_language() -> None:
    assert all(tiny.parse_caption(text) for text in composed().prompts.texts)
    assert any(tiny.parse_caption(text).held_out for text in composed().prompts.texts)
    english = composed("model=wan2.1-t2v-14b")
    assert len(english.prompts.texts) == 5
    assert not set(english.prompts.texts) & set(composed().prompts.texts)
    assert composed("prompts.texts=[one,two]").prompts.texts == ["one", "two"]


def test_nothing_is_measured_on_what_it_was_calibrated_on() -> None:
    for model in ("tiny", "wan2.1-t2v-14b"):
        config = composed(f"model={model}")
        assert not set(config.calib.texts) & set(config.prompts.texts)


def test_generation_settings_are_those_shipped_with_the_weights() -> None:
    shipped = json.loads((tiny.folder() / "generation.json").read_text())
    usual = {"guidance_scale_2": None, "solver": "unipc", "guidance": "branches"}
    assert dataclasses.asdict(composed().model.generation) == {**shipped, **usual}


@pytest.mark.parametrize(
    ("overrides", "protect", "model"),
    [
        ([], "boundary", "tiny"),
        (["~protect"], "none", "tiny"),
        (["protect.blocks=[3]"], "blocks=[3]", "tiny"),
        (["++protect.blocks=[3]"], "blocks=[3]", "tiny"),
        (["protect=exit", "protect.modules=[ffn.net.2]"], "exit modules=[ffn.net.2]", "tiny"),
        (["model.path=/models/mine"], "boundary", "mine"),
        (["model.outliers.count=5"], "boundary", "tiny outliers.count=5"),
        (["model=wan2.1-t2v-14b", "model.path=/models/mine"], "boundary", "wan2.1-t2v-14b"),
    ],
)
def test_names_say_what_was_used(overrides: list[str], protect: str, model: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        raw = compose("ptq", overrides)
    name_after_overrides(raw, overrides)
    config = OmegaConf.to_object(raw)
    assert isinstance(config, PTQConfig)
    assert (config.protect.name, config.model.name) == (protect, model)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("quant.wieghts.rule=direct", "wieghts"),
        ("protect=boundry", "boundry"),
        ("model.generation.steps=many", "steps"),
        ("protect.blocks=[a]", "blocks"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_a_mistake_is_named(override: str, named: str) -> None:
    with pytest.raises(Exception, match=named):
        composed(override)


@pytest.mark.parametrize("value", ["/a/x=1", "/a/über", "/a (1)/[b] {c}", "/it's", '/say "\\c\\', "/c,d"])
def test_a_value_that_cannot_be_read_is_told_as_it_can_be(value: str) -> None:
    with pytest.raises(HydraException) as error:
        composed(f"model.path={value}")
    told = one_line(error.value)
    assert "\n" not in told
    (word,) = shlex.split(told.rpartition("for the shell: ")[2])
    assert composed(word).model.path == value
