"""Who shares what: groups that a site keeps, sites of several tasks, sites of very different size; real training throughout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from client.site import load_site
from client.work import evaluate_round, handle, train_round
from server.strategy import begin, run
from simulations.inprocess import LocalSites
from tat_core.checkpoint import model_hash, read_model
from tat_core.config import RunConfig, load_config
from tat_core.data.dataset import read_json, write_json
from tat_core.groups import group_of
from tat_core.packet import Packet
from tat_core.sharing import owner_of

RUN = "1" * 32
SITE_ADAPTER = ["federation.task_groups=[]", "federation.site_groups=[adapter]"]


@pytest.fixture
def hospital(smoke_hospitals: list[Path], tmp_path: Path) -> Path:
    """A copy of one hospital, so that its state is this test's alone."""
    return Path(shutil.copytree(smoke_hospitals[2], tmp_path / "hospital"))


def _instruct(model: dict[str, np.ndarray], number: int, config: RunConfig) -> Packet:
    facts = {"run": RUN, "round": number, "base": model_hash(model), "nonce": "n", "steps": config.train.local_steps}
    return Packet(model, {}, facts)


def test_what_a_site_keeps_never_leaves_goes_on_and_repeats(hospital: Path, tmp_path: Path) -> None:
    config = load_config("smoke", SITE_ADAPTER)
    model = begin(config, tmp_path / "run").model
    assert "adapter" not in {group_of(name) for name in model}
    site = load_site(hospital / "site.yaml")
    first = handle(train_round, site, config, _instruct(model, 1, config))
    assert first.error is None
    assert first.arrays.keys() == model.keys()
    own = site.state_dir / "runs" / RUN / "000001.safetensors"
    kept = load_file(own)
    assert {group_of(name) for name in kept} == {"adapter"}
    second = handle(train_round, site, config, _instruct(model, 2, config))
    again = handle(train_round, site, config, _instruct(model, 2, config))
    assert all(np.array_equal(second.arrays[name], again.arrays[name]) for name in model)
    scores = handle(evaluate_round, site, config, _instruct(model, 2, config))
    assert scores.error is None
    own.unlink()
    (own.parent / "000002.safetensors").unlink()
    fresh = handle(train_round, site, config, _instruct(model, 2, config))
    assert any(not np.array_equal(second.arrays[name], fresh.arrays[name]) for name in model), (
        "round 2 went on with round 1's own"
    )


def test_a_damaged_own_state_falls_back_to_the_one_before(hospital: Path, tmp_path: Path) -> None:
    config = load_config("smoke", SITE_ADAPTER)
    model = begin(config, tmp_path / "run").model
    site = load_site(hospital / "site.yaml")
    for number in (1, 2):
        handle(train_round, site, config, _instruct(model, number, config))
    (site.state_dir / "runs" / RUN / "000002.safetensors").write_bytes(b"torn")
    assert handle(train_round, site, config, _instruct(model, 3, config)).error is None


def test_a_run_whose_sites_keep_their_adapters(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    config = load_config("smoke", SITE_ADAPTER)
    run(config, LocalSites(smoke_hospitals, config), tmp_path / "run")
    released = read_model(tmp_path / "run" / "model.safetensors")
    assert "adapter" not in {group_of(name) for name in released.arrays}
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])
    assert len(record["site_gain_db"]) >= 5


def test_one_group_cannot_be_the_tasks_and_the_sites_own() -> None:
    with pytest.raises(ValueError, match=r"federation\.site_groups"):
        load_config("smoke", ["federation.site_groups=[adapter]"])


def test_a_hospital_of_two_tasks_and_one_of_a_single_slice_take_part(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    both = Path(shutil.copytree(smoke_hospitals[0], tmp_path / "sites" / "a-both"))
    shutil.copytree(smoke_hospitals[2] / "MRI", both / "MRI")
    small = Path(shutil.copytree(smoke_hospitals[1], tmp_path / "sites" / "b-small"))
    for folder, name, data in ((both, "a-both", {"CT": "CT", "MRI": "MRI"}), (small, "b-small", {"CT": "CT"})):
        site = yaml.safe_load((folder / "site.yaml").read_text())
        (folder / "site.yaml").write_text(yaml.safe_dump({**site, "name": name, "data": data}))
    splits = read_json(small / "CT" / "splits.json", "test")
    kept = next(case for case, facts in splits["cases"].items() if facts["split"] == "train")
    write_json(small / "CT" / "splits.json", {**splits, "cases": {kept: splits["cases"][kept]}})
    folders = [both, small, Path(shutil.copytree(smoke_hospitals[5], tmp_path / "sites" / "c-pet"))]
    config = load_config("smoke", ["train.local_steps=4", "balance.kind=equal"])
    config = replace(config, num_rounds=1)
    before = begin(config, tmp_path / "reference").model
    after = run(config, LocalSites(folders, config), tmp_path / "run").model
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text())
    assert record["sites"]["a-both"]["tasks"] == ["CT", "MRI"]
    assert {facts["status"] for facts in record["sites"].values()} == {"ok"}
    assert set(record["tasks"]) == {"CT", "MRI", "PET"}
    for task in config.tasks:
        own = [key for key in before if owner_of(key)[0] == task]
        assert any(not np.array_equal(before[key], after[key]) for key in own), task
