"""The whole path in one process: real sample hospitals, real training, the real engine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client import alone, audit, work
from client.alone import fine_tune_round, kept_model, train_alone
from client.site import load_site
from client.site_commands import _problems
from client.work import describe, evaluate_round, handle, patient_bucket, train_round
from server.harm import COMPARISON
from server.strategy import run
from simulations.inprocess import LocalSites
from tat_core.blobs import packed_bytes
from tat_core.checkpoint import arrays_of, model_hash, read_model
from tat_core.config import RunConfig, load_config
from tat_core.data.prepared import open_split, prepare
from tat_core.evaluate import evaluate_split
from tat_core.groups import group_of
from tat_core.model.tat import build_model
from tat_core.packet import Packet
from tat_core.sharing import for_tasks, give_own
from tat_core.train import TrainResult, train

ABOUT = {"run": "0" * 32, "nonce": "0"}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("smoke")


def test_one_seed_one_model_to_the_bit(smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path) -> None:
    hashes = {}
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        seeded = replace(config, seed=seed)
        hashes[name] = model_hash(run(seeded, LocalSites(smoke_hospitals, seeded), tmp_path / name).model)
    assert hashes["first"] == hashes["second"]
    assert hashes["first"] != hashes["other"]


def test_a_run_scores_every_task_and_releases_a_model(smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path) -> None:
    run(config, LocalSites(smoke_hospitals, config), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])
    assert {name: facts["status"] for name, facts in record["sites"].items()} == {p.name: "ok" for p in smoke_hospitals}
    for task in config.tasks:
        facts = record["tasks"][task]
        assert 0 < facts["loss"] < 1
        assert facts["validation"]["input"]["count"] > 0
        assert np.isfinite(facts["validation"]["restored"]["psnr"])
    model = read_model(tmp_path / "run" / "model.safetensors")
    assert model.metadata["extra"]["round"] == record["best_round"]
    with pytest.raises(ValueError, match="expected one of its tasks CT, MRI, PET, got None"):
        model.network()
    ct, pet = (arrays_of(model.network(task)) for task in ("CT", "PET"))
    same = {name: np.array_equal(ct[name], pet[name]) for name in ct}
    assert {group_of(name) for name, equal in same.items() if not equal} == {"adapter"}
    assert all(equal for name, equal in same.items() if group_of(name) != "adapter")


def test_an_update_in_16_bits_is_the_update_rounded(smoke_hospitals: list[Path], config: RunConfig) -> None:
    site = load_site(smoke_hospitals[0] / "site.yaml")
    model = arrays_of(build_model(config.model, config.seed))
    asked = Packet(model, {}, {**ABOUT, "steps": config.train.local_steps, "round": 1, "base": model_hash(model)})
    exact, half = (
        handle(train_round, site, replace(config, federation=replace(config.federation, update_precision=kind)), asked)
        for kind in ("fp32", "bf16")
    )
    assert exact.error is half.error is None
    for name, update in exact.arrays.items():
        assert np.array_equal(half.arrays[name], torch.from_numpy(update).bfloat16().float().numpy())
    assert packed_bytes(half.arrays) * 2 == sum(value.nbytes for value in exact.arrays.values())
    assert list(audit.read(audit.audit_file(site)))[-1]["bytes"] == packed_bytes(half.arrays)


def test_training_lowers_the_loss_of_every_hospital(smoke_hospitals: list[Path], config: RunConfig) -> None:
    config = replace(config, num_rounds=2, train=replace(config.train, local_steps=20, lr=2e-3))
    start = arrays_of(build_model(config.model, config.seed))
    for folder in smoke_hospitals:
        site = load_site(folder / "site.yaml")
        (task,) = site.data
        model, left = start, []  # the share of the input's error that is left: patches differ, this hardly does
        for number in (1, 2):
            reply = handle(
                train_round,
                site,
                config,
                Packet(model, {}, {**ABOUT, "steps": config.train.local_steps, "round": number, "base": model_hash(model)}),
            )
            assert reply.error is None
            model = {name: value + reply.arrays[name] for name, value in model.items()}
            left.append(reply.metrics[f"{task}.loss_sum"] / reply.metrics[f"{task}.input_sum"])
        assert left[1] < left[0], folder.name


def test_only_a_code_leaves_a_site_that_fails(smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path) -> None:
    site = load_site(smoke_hospitals[0] / "site.yaml")
    secret = replace(site, data={"CT": tmp_path / "JOHN^DOE" / "missing"})
    base = arrays_of(build_model(config.model, config.seed))
    instruction = Packet(base, {}, {**ABOUT, "steps": config.train.local_steps, "round": 1, "base": model_hash(base)})
    reply = handle(train_round, secret, config, instruction)
    assert set(reply.config) == {"site", "error"}
    assert reply.error in {"BAD_INPUT", "SITE_IO"}
    assert not reply.arrays
    assert "DOE" not in str(reply)
    tampered = replace(instruction, config={**ABOUT, "steps": config.train.local_steps, "round": 1, "base": "0" * 64})
    assert handle(train_round, site, config, tampered).error == "BASE_MISMATCH"


def test_a_site_says_what_it_offers_and_no_more(smoke_hospitals: list[Path], config: RunConfig) -> None:
    reply = handle(describe, load_site(smoke_hospitals[0] / "site.yaml"), config, Packet())
    assert reply.config["site"] == smoke_hospitals[0].name
    assert reply.config["tasks"] == "CT"
    assert reply.config["patients"] == "1-10"
    assert set(reply.config) == {"site", "tasks", "patients", "fed_tat", "torch"}
    assert [patient_bucket(n) for n in (1, 10, 11, 200, 5000)] == ["1-10", "1-10", "11-50", "51-200", ">1000"]


def test_a_site_with_two_tasks_trains_both(smoke_hospitals: list[Path], config: RunConfig) -> None:
    ct, pet = (load_site(smoke_hospitals[i] / "site.yaml") for i in (0, 4))
    both = replace(ct, data={**ct.data, **pet.data})
    model = for_tasks(give_own(arrays_of(build_model(config.model, 0)), config.tasks, ("adapter",)), ("CT", "PET"))
    config = replace(config, train=replace(config.train, local_steps=8))
    reply = handle(
        train_round,
        both,
        config,
        Packet(model, {}, {**ABOUT, "steps": config.train.local_steps, "round": 1, "base": model_hash(model)}),
    )
    assert reply.error is None
    assert set(reply.arrays) == set(model)
    assert reply.metrics["CT.count"] + reply.metrics["PET.count"] == 8 * config.train.batch_size
    assert min(reply.metrics["CT.count"], reply.metrics["PET.count"]) > 0
    assert np.abs(reply.arrays["CT:output.weight"] - reply.arrays["PET:output.weight"]).max() > 0


@pytest.mark.parametrize("private", [False, True])
def test_a_task_that_the_hospital_declines_is_not_trained(
    smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    ct, pet = (load_site(smoke_hospitals[i] / "site.yaml") for i in (0, 4))
    both = replace(ct, data={**ct.data, **pet.data}, state_dir=tmp_path)
    if private:
        config = load_config("smoke", ["privacy.enabled=true", "privacy.noise_multiplier=1"])
    monkeypatch.setattr(work, "agreed_tasks", lambda *_: ("CT",))
    drawn: list[set[str]] = []
    whole = work.train
    monkeypatch.setattr(work, "train", lambda model, splits, *a, **k: drawn.append(set(splits)) or whole(model, splits, *a, **k))
    model = for_tasks(give_own(arrays_of(build_model(config.model, 0)), config.tasks, ("adapter",)), ("CT",))
    words = {**ABOUT, "steps": config.train.local_steps, "round": 1, "base": model_hash(model)}
    assert handle(train_round, both, config, Packet(model, {}, words)).error is None
    assert drawn == [{"CT"}]


def test_a_task_that_the_hospital_declines_is_not_fitted_either(
    smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct, pet = (load_site(smoke_hospitals[i] / "site.yaml") for i in (0, 4))
    both = replace(ct, data={**ct.data, **pet.data}, state_dir=tmp_path)
    monkeypatch.setattr(work, "agreed_tasks", lambda *_: ("PET",))  # not the first of the two
    config = replace(config, name="fitted", federation=replace(config.federation, fine_tune_steps=2))
    model = for_tasks(give_own(arrays_of(build_model(config.model, 0)), config.tasks, ("adapter",)), ("PET",))
    assert (
        handle(fine_tune_round, both, config, Packet(model, {}, {**ABOUT, "round": 3, "base": model_hash(model)})).error is None
    )
    assert read_model(kept_model(both, config)).network("PET") is not None


def test_a_folder_of_another_task_is_refused(
    smoke_hospitals: list[Path], config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    ct, mri = (load_site(smoke_hospitals[i] / "site.yaml") for i in (0, 2))
    swapped = replace(ct, data={"CT": mri.data["MRI"]})
    base = arrays_of(build_model(config.model, 0))
    instruction = Packet(base, {}, {**ABOUT, "steps": config.train.local_steps, "round": 1, "base": model_hash(base)})
    assert handle(train_round, swapped, config, instruction).error == "BAD_INPUT"
    assert "expected CT in data.CT, got a data set of MRI" in caplog.text
    assert any("the folder holds MRI" in problem for problem in _problems(swapped))


def test_a_site_keeps_the_released_model_fitted_to_its_own_images(
    smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path
) -> None:
    config = replace(
        config, name="fitted", federation=replace(config.federation, fine_tune_steps=60), train=replace(config.train, lr=5e-3)
    )
    hospitals = [smoke_hospitals[i] for i in (0, 2)]
    run(config, LocalSites(hospitals, config), tmp_path / "run")
    gains = json.loads((tmp_path / "run" / COMPARISON).read_text())["sites"]
    site = load_site(hospitals[0] / "site.yaml")
    released, kept = (
        read_model(tmp_path / "run" / "model.safetensors"),
        read_model(site.state_dir / "models" / "fitted.safetensors"),
    )
    assert kept.metadata["extra"]["fine_tuned_from"] == model_hash(for_tasks(released.arrays, ("CT",)))
    split = open_split(prepare(site.data["CT"]), "validation")
    for name, model in (("together", released), ("fine_tuned", kept)):
        scores = evaluate_split(model.network("CT"), split, config.evaluate, max_slices=config.evaluate.max_validation_slices)
        gain = scores["restored"].mean()["psnr"] - scores["input"].mean()["psnr"]
        assert gains[site.name][f"{name}_gain_db"] == pytest.approx(gain, abs=0.011)  # PSNRs leave with four digits
    assert gains[site.name]["fine_tuned_gain_db"] > gains[site.name]["together_gain_db"]
    assert kept.metadata["extra"]["steps"] == 60


@pytest.mark.parametrize(
    ("hospital", "added", "trains"),
    [("ct-abdomen", 0.1, True), ("ct-abdomen", math.nan, True), ("mri-t1", 0.1, False)],
    ids=["it is worse", "it diverges", "nothing tells"],
)
def test_the_released_model_is_kept_where_fitting_is_not_seen_to_help(
    smoke_hospitals: list[Path], config: RunConfig, monkeypatch: pytest.MonkeyPatch, hospital: str, added: float, trains: bool
) -> None:
    """`mri-t1` has no validation patients."""
    site = load_site(next(path for path in smoke_hospitals if path.name == hospital) / "site.yaml")
    config = replace(config, name=f"not-better-{added}", federation=replace(config.federation, fine_tune_steps=2))
    trained: list[bool] = []

    def harm(model: torch.nn.Module, *arguments: Any, **options: Any) -> TrainResult:
        trained.append(True)
        for parameter in model.parameters():
            parameter.data += added
        return train(model, *arguments, **options | {"num_steps": 1})

    monkeypatch.setattr(alone, "train", harm)
    model = arrays_of(build_model(config.model, 0))
    words = {**ABOUT, "round": 4, "base": model_hash(model)}
    reply = handle(fine_tune_round, site, config, Packet(model, {}, words))
    assert reply.error is None
    assert bool(trained) == trains
    kept = read_model(kept_model(site, config))
    assert kept.sha256 == model_hash(model)
    assert kept.metadata["extra"] == {"run": config.name, "fine_tuned_from": model_hash(model), "steps": 0}
    assert reply.metrics == handle(evaluate_round, site, config, Packet(model, {}, words)).metrics


def test_the_record_says_who_is_better_off_alone(smoke_hospitals: list[Path], config: RunConfig, tmp_path: Path) -> None:
    hospitals = [smoke_hospitals[i] for i in (0, 2)]
    config = replace(config, federation=replace(config.federation, baseline=True))
    run(config, LocalSites(hospitals, config), tmp_path / "run")
    sites = json.loads((tmp_path / "run" / COMPARISON).read_text())["sites"]
    assert set(sites) == {folder.name for folder in hospitals}
    site = load_site(hospitals[0] / "site.yaml")
    split = open_split(prepare(site.data["CT"]), "validation")
    scores = evaluate_split(train_alone(site, config), split, config.evaluate, max_slices=config.evaluate.max_validation_slices)
    gain = scores["restored"].mean()["psnr"] - scores["input"].mean()["psnr"]
    assert sites[site.name]["alone_gain_db"] == pytest.approx(gain, abs=0.011)  # PSNRs leave with four digits
    (kept,) = (site.state_dir / "alone").glob("*.json")
    before = kept.stat().st_mtime_ns
    run(config, LocalSites(hospitals, config), tmp_path / "again")
    assert kept.stat().st_mtime_ns == before
