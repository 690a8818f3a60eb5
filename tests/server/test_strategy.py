"""A run over hospitals that answer by rule: what a round makes of good, late, bad and missing replies, and of a crash."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rule_sites import SITES, RuleSites, good_reply

from server import journal
from server.collect import instruct
from server.sites import SiteInfo
from server.strategy import begin, run
from tat_core.checkpoint import model_hash, read_model
from tat_core.config import BalanceConfig, RunConfig
from tat_core.groups import GROUPS, group_of
from tat_core.packet import Packet
from tat_core.sharing import owner_of


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def _updates(model: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    members = {name: SiteInfo(tasks, "1-10") for name, tasks in SITES.items()}
    about = {"run": "0" * 32, "round": 1, "nonce": "0"}
    return {name: good_reply(name, packet).arrays for name, packet in instruct(model, about, members, {}).items()}


def test_the_step_is_the_mean_within_tasks_then_over_tasks(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=1, balance=BalanceConfig(kind="equal"))
    before = begin(config, tmp_path / "reference").model
    updates = _updates(before)
    state = run(config, RuleSites(), tmp_path / "run")
    for key, value in before.items():
        means = {
            "CT": lambda key: (updates["a-ct"][key] + updates["b-ct"][key]) / 2,
            "MRI": lambda key: updates["c-mri"][key],
            "PET": lambda key: updates["d-pet"][key],
        }
        owner = owner_of(key)[0]
        step = means[owner](key) if owner else sum(mean(key) for mean in means.values()) / 3
        np.testing.assert_allclose(state.model[key], value + step, rtol=1e-5, atol=1e-7)


def test_the_balancers_weight_changes_the_combined_step(config: RunConfig, tmp_path: Path) -> None:
    """A weight that a one-task site cannot feel (tests/tat_core/test_balance.py) moves the shared parameters here."""
    config = replace(config, num_rounds=1)
    models = {}
    for kind in ("equal", "closed_form"):
        some = replace(config, balance=BalanceConfig(kind=kind, warmup_rounds=0))
        models[kind] = run(some, RuleSites(), tmp_path / kind).model
        shares = [task["aggregation_weight"] for task in _records(tmp_path / kind)[0]["tasks"].values()]
        assert sum(shares) == pytest.approx(1.0)
        assert (len(set(shares)) == 1) == (kind == "equal")
    assert not np.allclose(models["equal"]["embed.weight"], models["closed_form"]["embed.weight"], rtol=1e-6, atol=0)
    assert np.array_equal(models["equal"]["CT:output.weight"], models["closed_form"]["CT:output.weight"])


def test_a_conflict_averse_step_is_as_long_and_serves_the_worst_task_better(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=1, balance=BalanceConfig(kind="equal"))
    averse = replace(config, federation=replace(config.federation, combination="conflict_averse", conflict_aversion=0.9))
    before = begin(config, tmp_path / "reference").model
    updates = _updates(before)
    shared = [key for key in before if owner_of(key)[0] is None and group_of(key) == "backbone"]

    def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[key].ravel() for key in shared]).astype(np.float64)

    tasks = [(flat(updates["a-ct"]) + flat(updates["b-ct"])) / 2, flat(updates["c-mri"]), flat(updates["d-pet"])]
    steps = {
        name: flat(run(some, RuleSites(), tmp_path / name).model) - flat(before)
        for name, some in (("mean", config), ("averse", averse))
    }
    assert np.linalg.norm(steps["averse"]) == pytest.approx(np.linalg.norm(steps["mean"]), rel=1e-3)
    assert min(task @ steps["averse"] for task in tasks) > min(task @ steps["mean"] for task in tasks)
    assert set(_records(tmp_path / "averse")[0]["group_cosines"]) == {"backbone", "hypernetwork"}


@pytest.mark.parametrize("task_groups", [(), ("adapter",), GROUPS], ids=["nothing", "adapters", "everything"])
def test_the_record_tells_how_far_the_model_moved_whatever_is_a_tasks_own(
    config: RunConfig, tmp_path: Path, task_groups: tuple[str, ...]
) -> None:
    federation = replace(config.federation, task_groups=task_groups)
    config = replace(config, num_rounds=1, balance=BalanceConfig(kind="equal"), federation=federation)
    before = begin(config, tmp_path / "reference").model
    after = run(config, RuleSites(), tmp_path / "run").model
    (record,) = _records(tmp_path / "run")
    moved = {key: np.linalg.norm((after[key] - before[key]).astype(np.float64)) for key in before}
    assert record["update_norm"] == pytest.approx(math.hypot(*moved.values()), rel=1e-4)
    assert set(record["cosines"]) == (set() if task_groups == GROUPS else {"CT-MRI", "CT-PET", "MRI-PET"})
    if task_groups == GROUPS:
        own = [length for key, length in moved.items() if owner_of(key)[0] == "PET"]
        assert record["task_update_norms"]["PET"] == pytest.approx(math.hypot(*own), rel=1e-4)


def test_a_task_that_nobody_reported_keeps_its_own_parameters(config: RunConfig, tmp_path: Path) -> None:
    before = begin(config, tmp_path / "reference").model
    tamper = RuleSites(lambda name, _round, reply: None if name == "d-pet" else reply)
    after = run(config, tamper, tmp_path / "run").model
    own = [key for key in before if owner_of(key)[0] == "PET"]
    assert own
    assert all(np.array_equal(before[key], after[key]) for key in own)
    assert not np.array_equal(before["CT:output.weight"], after["CT:output.weight"])


def test_the_order_of_replies_does_not_matter(config: RunConfig, tmp_path: Path) -> None:
    first = run(config, RuleSites(), tmp_path / "first")
    second = run(config, RuleSites(order=lambda names: sorted(names, reverse=True)), tmp_path / "second")
    assert model_hash(first.model) == model_hash(second.model)
    assert model_hash(first.average) == model_hash(second.average)


def test_what_a_run_leaves_behind(config: RunConfig, tmp_path: Path) -> None:
    state = run(config, RuleSites(), tmp_path / "run")
    records = _records(tmp_path / "run")
    assert [record["round"] for record in records] == [1, 2, 3]
    assert records[-1]["model_sha256"] == model_hash(state.model)
    assert records[-1]["mean_gain_db"] == pytest.approx(3.0)
    assert set(records[-1]["cosines"]) == {"CT-MRI", "CT-PET", "MRI-PET"}
    assert sum(task["aggregation_weight"] for task in records[-1]["tasks"].values()) == pytest.approx(1.0)
    # A lower loss means a higher weight in the published balancer; MRI and PET sites have the longer names, thus losses.
    assert records[0]["tasks"]["CT"]["task_weight"] > records[0]["tasks"]["PET"]["task_weight"]
    model = read_model(tmp_path / "run" / "model.safetensors")
    assert model.sha256 == model_hash(state.average)
    assert model.metadata["extra"]["round"] == 3
    assert not list((tmp_path / "run" / "spool").glob("*"))


def test_bad_replies_are_left_out_and_recorded(config: RunConfig, tmp_path: Path) -> None:
    def tamper(name: str, _round: int, reply: Packet) -> Packet | None:
        if name == "b-ct":
            return replace(reply, arrays={key: value * np.nan for key, value in reply.arrays.items()})
        return None if name == "d-pet" else reply

    state = run(config, RuleSites(tamper), tmp_path / "run")
    record = _records(tmp_path / "run")[0]
    assert {name: facts["status"] for name, facts in record["sites"].items()} == {
        "a-ct": "ok",
        "b-ct": "NOT_FINITE",
        "c-mri": "ok",
        "d-pet": "NO_REPLY",
    }
    assert set(record["tasks"]) == {"CT", "MRI"}
    assert all(np.isfinite(value).all() for value in state.model.values())


def test_a_round_without_a_good_reply_stops_the_run_and_keeps_what_was_done(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"round 2: expected at least one site's update"):
        run(config, RuleSites(lambda _name, number, reply: reply if number == 1 else None), tmp_path / "run")
    state = journal.load_state(tmp_path / "run")
    assert state is not None
    assert state.round == 1


def test_a_killed_run_resumes_to_the_same_bits_without_asking_again(config: RunConfig, tmp_path: Path) -> None:
    whole = run(config, RuleSites(), tmp_path / "whole")

    def die(name: str, number: int, reply: Packet) -> Packet:
        if (name, number) == ("c-mri", 2):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(config, RuleSites(die), tmp_path / "killed")
    again = RuleSites()
    resumed = run(replace(config, resume=True), again, tmp_path / "killed")
    assert model_hash(resumed.model) == model_hash(whole.model)
    assert model_hash(resumed.average) == model_hash(whole.average)
    assert resumed.balance == whole.balance
    assert [name for kind, number, name in again.asked if (kind, number) == ("train", 2)] == ["c-mri", "d-pet"]
    assert [record["round"] for record in _records(tmp_path / "killed")] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "manifest"])
def test_a_damaged_newest_state_is_passed_over(
    config: RunConfig, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(config, RuleSites(), tmp_path / "run")
    newest = tmp_path / "run" / "journal" / "000003.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-1] ^= 1
        newest.write_bytes(content)
    else:
        newest.with_suffix(".json").write_text('{"round": 3, ')
    state = journal.load_state(tmp_path / "run")
    assert state is not None
    assert state.round == 2
    assert "000003 is damaged" in caplog.text
    resumed = run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert model_hash(resumed.model) == model_hash(whole.model)
    assert [record["round"] for record in _records(tmp_path / "run")] == [1, 2, 3]


def test_a_taken_folder_and_another_configuration_are_refused(config: RunConfig, tmp_path: Path) -> None:
    run(replace(config, num_rounds=1), RuleSites(), tmp_path / "run")
    with pytest.raises(ValueError, match="expected a new run folder"):
        run(config, RuleSites(), tmp_path / "run")
    with pytest.raises(ValueError, match="expected the configuration"):
        run(replace(config, resume=True), RuleSites(), tmp_path / "run")


def test_a_site_with_two_tasks_counts_toward_each_by_its_share(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SITES, "b-ct", ("CT", "MRI"))
    config = replace(config, num_rounds=1, balance=BalanceConfig(kind="equal"))
    before = begin(config, tmp_path / "reference").model
    updates = _updates(before)
    state = run(config, RuleSites(), tmp_path / "run")
    name = "embed.weight"
    ct = (updates["a-ct"][name] + 0.5 * updates["b-ct"][name]) / 1.5
    mri = (updates["c-mri"][name] + 0.5 * updates["b-ct"][name]) / 1.5
    expected = before[name] + (ct + mri + updates["d-pet"][name]) / 3
    np.testing.assert_allclose(state.model[name], expected, rtol=1e-5, atol=1e-7)
    own = "MRI:output.weight"
    expected = before[own] + (updates["c-mri"][own] + 0.5 * updates["b-ct"][own]) / 1.5
    np.testing.assert_allclose(state.model[own], expected, rtol=1e-5, atol=1e-7)


def test_an_overlong_update_is_shortened_and_an_absurd_one_refused(config: RunConfig, tmp_path: Path) -> None:
    def tamper(name: str, number: int, reply: Packet) -> Packet:
        factor = {("a-ct", 2): 10.0, ("b-ct", 2): 1000.0}.get((name, number), 1.0)
        return replace(reply, arrays={key: value * np.float32(factor) for key, value in reply.arrays.items()})

    run(config, RuleSites(tamper), tmp_path / "run")
    first, second, third = _records(tmp_path / "run")
    usual = np.median([first["sites"][name]["norm"] for name in ("a-ct", "b-ct")])
    shortened = second["sites"]["a-ct"]
    assert shortened["norm"] * shortened["scale"] == pytest.approx(3 * usual)
    assert second["sites"]["b-ct"]["status"] == "ABSURD_LENGTH"
    assert third["sites"]["b-ct"]["status"] == "ok"
    assert all(facts["scale"] == 1.0 for facts in first["sites"].values())


def test_a_site_with_three_strikes_is_left_out_until_readmitted(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=6)

    def tamper(name: str, number: int, reply: Packet) -> Packet:
        if name == "d-pet" and number == 5:  # an operator's word, while round 5 goes on
            (tmp_path / "run" / "readmit").mkdir(exist_ok=True)
            (tmp_path / "run" / "readmit" / "b-ct").touch()
        spoilt = name == "b-ct" and number < 5
        return replace(reply, config={**reply.config, "round": 0}) if spoilt else reply

    run(config, RuleSites(tamper), tmp_path / "run")
    statuses = [record["sites"]["b-ct"]["status"] for record in _records(tmp_path / "run")]
    assert statuses == ["STALE", "STALE", "STALE", "LEFT_OUT", "LEFT_OUT", "ok"]


def test_a_site_that_reports_its_own_failure_gets_no_strike(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=5)
    failing = RuleSites(lambda name, _round, reply: Packet(config={"error": "SITE_IO"}) if name == "b-ct" else reply)
    run(config, failing, tmp_path / "run")
    assert {record["sites"]["b-ct"]["status"] for record in _records(tmp_path / "run")} == {"SITE_IO"}


def test_sites_may_join_leave_and_return(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=4)

    class Coming(RuleSites):
        rounds = 0

        def members(self, config: RunConfig) -> dict[str, SiteInfo]:
            self.rounds += 1
            absent = {1: ("d-pet",), 2: ("a-ct", "b-ct"), 3: ("a-ct",)}.get(self.rounds, ())
            return {name: info for name, info in super().members(config).items() if name not in absent}

    run(config, Coming(), tmp_path / "run")
    records = _records(tmp_path / "run")
    assert [record["frozen_tasks"] for record in records] == [["PET"], ["CT"], [], []]
    assert [len(record["sites"]) for record in records] == [3, 2, 3, 4]


def test_a_round_closes_at_its_deadline_once_every_task_has_replied(config: RunConfig, tmp_path: Path) -> None:
    federation = replace(config.federation, deadline_floor_s=0.05, deadline_factor=1.0)
    config = replace(config, num_rounds=2, federation=federation)

    class Slow(RuleSites):
        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            yield from super().ask(kind, {name: p for name, p in instructions.items() if name != "b-ct"}, timeout_s)
            if "b-ct" in instructions:
                for _ in range(20 if instructions["b-ct"].config["round"] == 2 else 0):
                    time.sleep(0.02)
                    yield None
                yield "b-ct", good_reply("b-ct", instructions["b-ct"])

    run(config, Slow(), tmp_path / "run")
    first, second = _records(tmp_path / "run")
    assert first["sites"]["b-ct"]["status"] == "ok"
    assert second["sites"]["b-ct"]["status"] == "NO_REPLY"
    assert set(second["tasks"]) == {"CT", "MRI", "PET"}


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_server_optimisers_resume_to_the_same_bits(config: RunConfig, tmp_path: Path, kind: str) -> None:
    federation = replace(config.federation, server_optimiser=kind, server_lr=0.01)
    config = replace(config, federation=federation)
    whole = run(config, RuleSites(), tmp_path / "whole")

    def die(name: str, number: int, reply: Packet) -> Packet:
        if (name, number) == ("a-ct", 3):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(config, RuleSites(die), tmp_path / "killed")
    resumed = run(replace(config, resume=True), RuleSites(), tmp_path / "killed")
    assert model_hash(resumed.model) == model_hash(whole.model)
    plain = run(replace(config, federation=replace(federation, server_optimiser="average")), RuleSites(), tmp_path / "plain")
    assert model_hash(plain.model) != model_hash(whole.model)


class Straggling(RuleSites):
    """The reply of b-ct to round 1 comes in round 2, in which it trains nothing else."""

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        number = next(iter(instructions.values())).config["round"]
        slow = kind == "train" and number in (1, 2)
        prompt = {name: packet for name, packet in instructions.items() if not (slow and name == "b-ct")}
        if slow and number == 1:
            self.kept = good_reply("b-ct", instructions["b-ct"])
        elif slow and "b-ct" in instructions:
            yield "b-ct", self.kept
        yield from super().ask(kind, prompt, timeout_s)
        while slow:
            time.sleep(0.02)
            yield None


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_late_reply_counts_as_configured(config: RunConfig, tmp_path: Path, weight: float) -> None:
    federation = replace(
        config.federation, staleness_weight=weight, deadline_floor_s=0.1, deadline_factor=1.0, round_timeout_s=0.3
    )
    sites = Straggling()
    state = run(replace(config, num_rounds=2, federation=federation), sites, tmp_path / "run")
    first, second = (record["sites"]["b-ct"] for record in _records(tmp_path / "run"))
    assert first["status"] == "NO_REPLY"
    assert second["status"] == ("late" if weight else "NO_REPLY")
    assert second.get("scale", weight) == pytest.approx(weight)
    prompt = run(replace(config, num_rounds=2, federation=federation), Straggling(), tmp_path / "again")
    assert model_hash(state.model) == model_hash(prompt.model)
    assert state.awaited.keys() == {"b-ct"}


def test_a_slow_site_takes_fewer_steps_and_counts_in_full(config: RunConfig, tmp_path: Path) -> None:
    train = replace(config.train, local_steps=8, step_budget=True)
    federation = replace(config.federation, clip_factor=100.0)

    class OneSlow(RuleSites):
        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            for news in super().ask(kind, instructions, timeout_s):
                if news is not None and news[0] == "d-pet" and kind == "train":
                    time.sleep(0.5)
                yield news

    run(replace(config, num_rounds=2, train=train, federation=federation), OneSlow(), tmp_path / "run")
    first, second = (record["sites"] for record in _records(tmp_path / "run"))
    assert {facts["steps"] for facts in first.values()} == {8}
    assert second["d-pet"]["steps"] < 8
    assert second["d-pet"]["scale"] == pytest.approx(8 / second["d-pet"]["steps"])
    assert {second[name]["scale"] for name, facts in second.items() if facts["steps"] == 8} == {1.0}
