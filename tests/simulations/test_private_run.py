"""A whole run with differential privacy, in one process: what leaves the hospitals, and what the run is left with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from typer.testing import CliRunner

from client import ledger
from client.record_commands import privacy_app
from client.site import load_site
from client.work import agreed_splits, evaluate_round, handle, train_round
from server.strategy import run
from simulations.inprocess import LocalSites
from tat_core.checkpoint import arrays_of, model_hash, read_model
from tat_core.config import load_config
from tat_core.groups import group_of
from tat_core.model.tat import build_model
from tat_core.packet import Packet

PRIVATE = ["privacy.enabled=true", "privacy.epsilon=8", "privacy.groups=[backbone,adapter]"]


def test_a_private_run_ends_with_a_model_and_without_scores(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    config = load_config("smoke", PRIVATE)
    run(config, LocalSites(smoke_hospitals, config), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])
    assert {facts["status"] for facts in record["sites"].values()} == {"ok"}
    assert record["mean_gain_db"] is None
    assert read_model(tmp_path / "run" / "model.safetensors").metadata["extra"]["round"] == config.num_rounds
    for hospital in smoke_hospitals:
        site_file = hospital / "site.yaml"
        exported = CliRunner().invoke(privacy_app, ["export", str(site_file)]).stdout
        charges = [c for line in exported.splitlines() for c in json.loads(line)["history"] or ()]
        site = load_site(site_file)
        reported = ledger.account(site, ledger.marks_of(agreed_splits(site, config).values())).epsilon
        assert len(charges) >= config.num_rounds
        assert reported == pytest.approx(_epsilon_by_google(charges, site.privacy.delta), rel=0.01)


def _epsilon_by_google(charges: list[tuple[float, float, int]], delta: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for sigma, rate, steps in charges:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(delta))


def test_a_private_reply_is_within_range_moves_what_is_trained_and_never_repeats(smoke_hospitals: list[Path]) -> None:
    config = load_config("smoke", PRIVATE)
    site = load_site(smoke_hospitals[0] / "site.yaml")
    (task,) = site.data
    base = arrays_of(build_model(config.model, config.seed))
    version = {"run": "0" * 32, "steps": config.train.local_steps, "round": 1, "base": model_hash(base), "nonce": "n"}
    first, second = (handle(train_round, site, config, Packet(base, {}, version | {"run": run * 32})) for run in "01")
    assert first.error is None
    for name, value in first.arrays.items():
        assert value.any() == (group_of(name) != "hypernetwork"), name
        assert value.any() != np.array_equal(value, second.arrays[name]), name
    count = first.metrics[f"{task}.count"]
    assert count == second.metrics[f"{task}.count"]
    for name in ("input_sum", "change_sum", "loss_sum"):
        assert 0 < first.metrics[f"{task}.{name}"] <= 0.1 * count
    assert handle(evaluate_round, site, config, Packet(base, {}, version)).metrics == {}
