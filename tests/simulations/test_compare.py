"""The comparison: its statistics against values known beforehand, its claims, and one arm of each kind really trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from server import strategy
from server.journal import ServerState
from simulations.compare.__main__ import COMMON
from simulations.compare.arms import ARMS, Job, do
from simulations.compare.report import judge, write_report
from simulations.compare.stats import difference, gap_closed, paired_interval
from tat_core.config import config_to_dict

SHORT = ("train.local_steps=2", "federation.fine_tune_steps=2", "evaluate.max_validation_slices=1")
TASK_OF = {"a": "CT", "b": "CT", "c": "PET"}


def test_the_mean_counts_every_task_the_same_however_many_sites_it_has() -> None:
    values = {1: {"a": np.full(3, 1.0), "b": np.full(9, 3.0), "c": np.full(5, 10.0)}}
    found = paired_interval(values, TASK_OF, np.random.default_rng(0))
    assert (found.mean, found.low, found.high) == (6.0, 6.0, 6.0)


def test_the_interval_of_one_site_and_seed_is_scipys_bootstrap() -> None:
    sample = np.random.default_rng(1).normal(0.5, 1.0, 40)
    ours = paired_interval({1: {"a": sample}}, {"a": "CT"}, np.random.default_rng(0))
    theirs = bootstrap((sample,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0))
    assert ours.mean == pytest.approx(sample.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = {seed: {"a": np.linspace(-1, 1, 20)} for seed in (1, 2, 3)}
    differ = {seed: {"a": np.linspace(-1, 1, 20) + seed - 2} for seed in (1, 2, 3)}
    narrow, wide = (paired_interval(values, {"a": "CT"}, np.random.default_rng(0)) for values in (agree, differ))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-3, 3))
def test_a_constant_difference_is_found_exactly(slices: list[float], shift: float) -> None:
    values = {seed: {"a": np.array(slices) * seed} for seed in (1, 2)}
    moved = {seed: {"a": sites["a"] + shift} for seed, sites in values.items()}
    found = paired_interval(difference(moved, values), {"a": "CT"}, np.random.default_rng(0))
    assert (found.mean, found.low, found.high) == pytest.approx((shift,) * 3, abs=1e-9)


def test_a_gap_too_small_to_divide_by_is_not_closed() -> None:
    assert gap_closed(2.0, 1.0, 3.0) == pytest.approx(0.5)
    assert gap_closed(2.0, 1.0, 1.05) is None
    assert gap_closed(2.0, 3.0, 1.0) is None


def _result(arm: str, gains: dict[str, float], seed: int = 1) -> dict[str, Any]:
    def scored(gain: float) -> dict[str, list[float]]:
        return {f"input.{m}": [20.0] * 6 for m in ("psnr", "ssim", "rmse")} | {
            f"restored.{m}": [20.0 + gain] * 6 for m in ("psnr", "ssim", "rmse")
        }

    at = {site: {"task": TASK_OF[site], "test": scored(gain), "validation": scored(gain)} for site, gain in gains.items()}
    origins = sorted(gains) if arm == "alone" else ["all"]
    return {
        "arm": arm,
        "seed": seed,
        "curve": [{"CT": 0.9, "PET": 0.8}],
        "train_seconds": 1.0,
        "scores": dict.fromkeys(origins, at),
    }


@pytest.mark.parametrize(("ours_at_c", "holds"), [(3.0, True), (0.5, False)])
def test_one_hospital_that_loses_is_a_claim_that_does_not_hold(tmp_path: Path, ours_at_c: float, holds: bool) -> None:
    others = {"a": 1.0, "b": 1.0, "c": 1.0}
    results = [_result(arm, others) for arm in ("alone", "within", "pooled", "fedavg")]
    results.append(_result("ours", {"a": 2.0, "b": 2.0, "c": ours_at_c}))
    verdict = judge(results)
    assert verdict.holds is holds
    assert verdict.figures["ours - alone, c, upper end"] == pytest.approx(ours_at_c - 1)
    write_report(tmp_path, results, verdict, {"steps": 1, "local_steps": 1})
    page = (tmp_path / "compare.md").read_text()
    assert ("does not hold" not in page) is holds
    assert json.loads((tmp_path / "compare.json").read_text())["holds"] is holds


@pytest.mark.parametrize("arm", ["alone", "specialist", "pooled", "fedprox", "ours"])
def test_an_arm_trains_scores_and_is_not_trained_again(
    smoke_hospitals: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    sites = tuple(smoke_hospitals[i] for i in (0, 2, 4))
    job = Job(arm, 1, "smoke", SHORT, 4, sites, tmp_path, "cpu")
    result = do(job)
    origin = "ct-abdomen" if arm in ("alone", "ours") else "all"
    scores = result["scores"][origin]["ct-abdomen"]["test"]
    assert len(scores["restored.psnr"]) == len(scores["input.psnr"]) > 0
    assert np.isfinite(scores["restored.psnr"]).all()
    monkeypatch.setattr("simulations.compare.arms._TRAIN", {})
    assert do(job) == json.loads(json.dumps(result))
    assert replace(job, seed=2).result_file != job.result_file
    shared = replace(job, overrides=(*SHORT, "federation.server_lr=1.25"))
    assert (shared.result_file != job.result_file) == (arm == "ours")


def test_an_interrupted_arm_goes_on_with_the_round_it_was_in(
    smoke_hospitals: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = tuple(smoke_hospitals[i] for i in (0, 2))
    job, beside = (Job("ours", 1, "smoke", SHORT, 8, sites, tmp_path / name, "cpu") for name in ("a", "b"))
    rounds: list[int] = []
    whole = strategy.run_round

    def run_round(state: ServerState, *others: Any) -> ServerState:
        rounds.append(state.round + 1)
        if rounds == [1, 2, 3]:
            raise KeyboardInterrupt
        return whole(state, *others)

    with monkeypatch.context() as patched:
        patched.setattr("server.strategy.run_round", run_round)
        with pytest.raises(KeyboardInterrupt):
            do(job)
        result = do(job)
    assert rounds == [1, 2, 3, 3]
    assert {**result, "train_seconds": 0} == {**do(beside), "train_seconds": 0}


def test_arms_differ_and_take_the_same_number_of_steps(tmp_path: Path) -> None:
    configs = {
        arm: Job(arm, 1, "demo", COMMON, 600, (tmp_path,), tmp_path, "cpu").config
        for arm, facts in ARMS.items()
        if facts.how == "federated"
    }
    assert len({json.dumps(config_to_dict(config), sort_keys=True) for config in configs.values()}) == len(configs)
    for config in configs.values():
        assert config.num_rounds * config.train.local_steps + config.federation.fine_tune_steps == 600
    with pytest.raises(
        ValueError, match=r"compare: expected steps in rounds to be a multiple of train.local_steps = 10, got 605"
    ):
        _ = Job("alone", 1, "demo", (), 605, (tmp_path,), tmp_path, "cpu").config
