"""Fitting a released model to one hospital or a new task changes what it should, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from client.site import load_site
from tat_core.adapt import adapt
from tat_core.adapt_command import command
from tat_core.checkpoint import arrays_of, read_model, save_model
from tat_core.cli import _as_command
from tat_core.config import load_config
from tat_core.data.prepared import open_split, prepare
from tat_core.groups import group_of
from tat_core.model.tat import build_model
from tat_core.sharing import give_own, owner_of

CONFIG = load_config("smoke")


def _released(tasks: tuple[str, ...], task_groups: tuple[str, ...] = ("adapter",)) -> dict[str, np.ndarray]:
    return give_own(arrays_of(build_model(CONFIG.model, 3)), tasks, task_groups)


def _adapt(arrays: dict[str, np.ndarray], hospital: Path, groups: tuple[str, ...] = ("adapter",)) -> dict[str, np.ndarray]:
    (folder,) = load_site(hospital / "site.yaml").data.values()
    split = open_split(prepare(folder), "train")
    config = replace(CONFIG.train, lr=1e-3)
    return adapt(arrays, CONFIG.model, split, config, groups=groups, num_steps=3, seed=0)


def test_only_the_tasks_own_group_is_trained(smoke_hospitals: list[Path]) -> None:
    before = _released(("CT", "MRI", "PET"))
    after = _adapt(before, smoke_hospitals[0])
    assert after.keys() == before.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed
    assert {owner_of(key)[0] for key in changed} == {"CT"}
    assert {group_of(owner_of(key)[1]) for key in changed} == {"adapter"}


def test_a_new_task_starts_from_the_others_and_leaves_them(smoke_hospitals: list[Path]) -> None:
    before = _released(("CT", "MRI"))
    after = _adapt(before, smoke_hospitals[4])
    assert {owner_of(key)[0] for key in set(after) - set(before)} == {"PET"}
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_model_without_tasks_own_restores_the_other_tasks_as_before(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    before = _released(("CT",), ())
    after = _adapt(before, smoke_hospitals[0], ("adapter", "hypernetwork"))
    save_model(tmp_path / "model.safetensors", after, CONFIG.model)
    saved = read_model(tmp_path / "model.safetensors")
    mri, ct = (arrays_of(saved.network(task)) for task in ("MRI", "CT"))
    same = {name for name in before if np.array_equal(before[name], mri[name])}
    assert same >= {name for name in before if not name.startswith("tren.task")}
    assert any(not np.array_equal(before[name], ct[name]) for name in before)


def test_the_command_writes_a_model_and_refuses_what_it_cannot_do(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    save_model(tmp_path / "released.safetensors", _released(("CT", "MRI", "PET")), CONFIG.model, {"seed": 3})
    (folder,) = load_site(smoke_hospitals[0] / "site.yaml").data.values()
    released, mine = str(tmp_path / "released.safetensors"), str(tmp_path / "a/new/folder/mine.safetensors")
    arguments = [released, str(folder), "-o", mine, "--patch-size", "32"]
    runner = CliRunner()
    result = runner.invoke(_as_command("adapt", command), [*arguments, "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert read_model(Path(mine)).metadata["extra"]["adapted_task"] == "CT"
    again = runner.invoke(_as_command("adapt", command), arguments)
    assert isinstance(again.exception, ValueError)
    assert "expected a new file" in str(again.exception)
    wrong = runner.invoke(_as_command("adapt", command), [*arguments[:3], str(tmp_path / "x"), "--groups", "norms"])
    assert "task_groups" in str(wrong.exception)


def test_a_model_whose_sites_keep_a_group_says_so(tmp_path: Path) -> None:
    arrays = give_own(arrays_of(build_model(CONFIG.model, 3)), ("CT",), (), ("adapter",))
    save_model(tmp_path / "model.safetensors", arrays, CONFIG.model)
    with pytest.raises(ValueError, match="none of the adapter, kept by each site"):
        read_model(tmp_path / "model.safetensors").network()
