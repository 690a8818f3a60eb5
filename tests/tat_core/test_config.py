"""Presets, overrides, checks and round trips of the configuration, and what its errors say."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_core.config import (
    BalanceConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    preset_names,
)
from tat_core.settings import key_prefix, known_keys


def test_presets_are_found_and_carry_their_name() -> None:
    assert set(preset_names()) >= {"demo", "full", "paper", "smoke"}
    for name in preset_names():
        config = load_config(name)
        assert config.preset == config.name == name


@pytest.mark.parametrize("name", ["demo", "full", "paper", "smoke"])
def test_preset_file_says_command_cost_and_expectation(name: str) -> None:
    text = (Path(__file__).parents[2] / "tat_core" / "conf" / f"{name}.yaml").read_text()
    header = text[: text.index("defaults:")]
    for word in ("command", "cost", "expect"):
        assert re.search(rf"^#\s+{word}\s+\S", header, re.MULTILINE), f"{name}.yaml: no {word} in the header"


def test_paper_is_the_published_set_up() -> None:
    config = load_config("paper")
    assert config.model == ModelConfig()
    assert (config.model.dim, config.model.num_blocks, config.model.kernel_init) == (48, (4, 6, 6, 8), "published")
    assert (config.train.lr, config.train.lr_min, config.train.betas, config.train.schedule) == (
        2e-4,
        1e-7,
        (0.9, 0.99),
        "cosine",
    )
    assert (config.train.patch_size, config.train.batch_size, config.train.ema_decay, config.seed) == (128, 4, 0.999, 42)
    assert config.num_rounds * config.train.local_steps == 400_000
    assert config.balance.kind == "closed_form"
    assert config.train.loss == "balanced"


def test_result_is_frozen_hashable_and_made_of_tuples() -> None:
    config = load_config("demo", "model.heads=[1,2,4,8] tasks=[CT,PET]")
    assert hash(config) == hash(load_config("demo", ["model.heads=[1,2,4,8]", "tasks=[CT,PET]"]))
    assert config.model.heads == (1, 2, 4, 8)
    assert isinstance(config.train.betas, tuple)
    assert config.tasks == ("CT", "PET")
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_overrides_take_effect_and_the_last_one_wins() -> None:
    config = load_config("demo", "seed=7 train.lr=1e-3 train.lr=2e-3 name=trial-1 train.weight_decay=0")
    assert (config.seed, config.train.lr, config.name, config.preset) == (7, 2e-3, "trial-1", "demo")
    assert isinstance(config.train.weight_decay, float)
    assert config.model == load_config("demo").model


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("seed=3   num_rounds=2", ["seed=3", "num_rounds=2"]),
        ("'model.heads=[1, 2, 4, 8]' seed=3", ["model.heads=[1, 2, 4, 8]", "seed=3"]),
        ('output_dir="my runs"', ["output_dir=my runs"]),
        ("preset=demo", []),
    ],
)
def test_string_is_split_as_a_shell_would(text: str, items: list[str]) -> None:
    assert load_config("demo", text) == load_config("demo", items)


REFUSED = [
    ("train.lrr=1", ["'train.lrr'", "did you mean train.lr?"]),
    ("lr=1", ["'lr'", "did you mean train.lr?"]),
    ("local_stepz=1", ["'local_stepz'", "train.local_steps"]),
    ("zzz=1", ["'zzz'", "tat config show"]),
    ("hydra.run.dir=x", ["'hydra.run.dir'"]),
    ("model.dim.x=1", ["'model.dim.x'"]),
    ("train=3", ["section 'train'", "train.patch_size"]),
    ("train.batch_size=four", ["train.batch_size", "a whole number", "'four'"]),
    ("train.batch_size=4.5", ["train.batch_size", "a whole number", "4.5"]),
    ("train.batch_size=true", ["train.batch_size", "a whole number", "true"]),
    ("train.lr=fast", ["train.lr", "a finite number", "'fast'"]),
    ("train.lr=null", ["train.lr", "a finite number", "null"]),
    ("train.lr=nan", ["train.lr", "a finite number", "nan"]),
    ("train.lr=inf", ["train.lr", "a finite number", "inf"]),
    ("train.lr=[", ["train.lr", "a finite number"]),
    ("train.lr=1,2", ["train.lr", "a finite number"]),
    ("train.lr={a:1}", ["train.lr", "a finite number"]),
    ("seed=1 train.lr=-1", ["train.lr", "above 0", "-1"]),
    ("train.lr=1e-9", ["train.lr_min", "at most train.lr"]),
    ("train.patch_size=8", ["train.patch_size", "at least 16", "got 8"]),
    ("train.ema_decay=1", ["train.ema_decay", "below 1"]),
    ("train.betas=[0.9]", ["train.betas", "a list of 2 numbers"]),
    ("train.betas=[0.9,1.0]", ["train.betas", "below 1"]),
    ("train.betas=[a,b]", ["train.betas", "a list of 2 numbers"]),
    ("train.schedule=step", ["train.schedule", "cosine, constant", "'step'"]),
    ("model.heads=[1,2,4]", ["model.heads", "a list of 4 whole numbers"]),
    ("model.heads=[1,3,4,8]", ["model.heads", "level 2"]),
    ("model.dim=7", ["model.dim", "even", "got 7"]),
    ("num_rounds=0", ["num_rounds", "at least 1", "got 0"]),
    ("seed=-1", ["seed", "at least 0"]),
    ("seed=4294967296", ["seed", "below 4294967296"]),
    ("tasks=[CT,XR]", ["tasks", "CT, MRI, PET", "XR"]),
    ("tasks=[]", ["tasks", "one or more"]),
    ("tasks=[CT,CT]", ["tasks", "none twice"]),
    ("tasks=CT", ["tasks", "a list of words"]),
    ("name=../../etc", ["name", "letters", "../../etc"]),
    ("name=", ["name", "letters"]),
    ("name=${oc.env:HOME}", ["name", "plain value"]),
    ("evaluate.tile_overlap=64 evaluate.tile_size=64", ["evaluate.tile_overlap", "below evaluate.tile_size"]),
    ("preset=smoke", ["preset", "'demo'"]),
    ("verbose", ["key=value", "'verbose'"]),
    ("+extra=1", ["key=value", "'+extra=1'"]),
    ("~train", ["key=value", "'~train'"]),
    ("'seed=1", ["key=value", "No closing quotation"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_wrong_override_is_refused_in_house_form(overrides: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^config: expected .+, got .+; .+") as caught:
        load_config("demo", overrides)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    for foreign in ("hydra/", "omegaconf", "full_key", "object_type", "Traceback", "mismatched input"):
        assert foreign not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(known_keys(RunConfig))), st.text(alphabet="019.,eE-+[]{}()'\"$:\\\n nulltruefas", max_size=12))
def test_no_value_gets_past_with_another_kind_of_error(key: str, value: str) -> None:
    message = ""
    try:
        load_config("demo", [f"{key}={value}"])
    except ValueError as error:
        message = str(error)
    assert not message or re.fullmatch(r"config: expected .+, got .+; .+", message)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected a preset among demo, .*paper, .*smoke.*, got 'dmeo'"):
        load_config("dmeo")


@pytest.mark.parametrize("preset", ["../conf/demo", "demo.yaml", "", "base"])
def test_preset_is_a_name_not_a_path(preset: str) -> None:
    with pytest.raises(ValueError, match="expected a preset among"):
        load_config(preset)


@pytest.mark.parametrize("name", ["demo", "full", "paper", "smoke"])
def test_round_trip_through_json_and_yaml(name: str) -> None:
    config = load_config(name, "tasks=[MRI]")
    plain = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(plain))) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert config_from_dict(config_to_dict(config.model), ModelConfig) == config.model


def test_float_that_a_file_wrote_as_integer_comes_back_as_float() -> None:
    train = config_from_dict({"lr": 1, "betas": [0, 0]}, TrainConfig)
    assert isinstance(train.lr, float)
    assert train.betas == (0.0, 0.0)
    assert isinstance(train.betas[0], float)


def test_absent_key_takes_its_default() -> None:
    assert config_from_dict({"model": {"dim": 16}}) == replace(RunConfig(), model=ModelConfig(dim=16))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"dimm": 3}}, ["'model.dimm'", "did you mean model.dim?"]),
        ({"model": 3}, ["model", "a mapping"]),
        ({"seed": "42"}, ["seed", "a whole number", "'42'"]),
        ({"seed": True}, ["seed", "a whole number", "True"]),
        ({"model": {"heads": [1, 2, "4", 8]}}, ["model.heads", "a list of 4 whole numbers"]),
        ({"train": {"lr": None}}, ["train.lr", "a finite number", "None"]),
    ],
)
def test_wrong_dict_is_refused(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^config: expected .+, got .+; .+") as caught:
        config_from_dict(values)
    for word in words:
        assert word in str(caught.value)


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"model\.dim to be of at least 2, got 0"):
        ModelConfig(dim=0)
    with pytest.raises(ValueError, match=r"model\.heads to be a list of 4"):
        ModelConfig(heads=[1, 2, 4, 8])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"balance\.kind to be one of"):
        BalanceConfig(kind="loud")
    with pytest.raises(ValueError, match=r"evaluate\.tile_overlap to be below"):
        replace(EvaluateConfig(), tile_size=32)


def test_every_setting_has_documentation_and_a_key_that_names_its_place() -> None:
    hints = get_type_hints(RunConfig)
    for entry in fields(RunConfig):
        if is_dataclass(hints[entry.name]):
            assert key_prefix(hints[entry.name]) == f"{entry.name}."
    undocumented = [key for key, (_, doc) in known_keys(RunConfig).items() if not doc.endswith(".")]
    assert undocumented == [], "declare these with setting(default, 'one sentence.')"


def test_loading_leaves_no_folder_and_logging_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    load_config("demo", "seed=3")
    assert list(tmp_path.iterdir()) == []
    assert (root.level, list(root.handlers)) == before
