"""What goes wrong in three weeks: replies twice, nobody reached, files damaged or moved, scores that make no sense."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rule_sites import SITES, CutOff, RuleSites, good_reply

from server import journal
from server.collect import NobodyRepliedError
from server.history import NEW_ROUNDS, SiteHistory
from server.sites import SiteInfo
from server.strategy import begin, run
from tat_core.checkpoint import model_hash, read_model
from tat_core.config import RunConfig
from tat_core.packet import Packet


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def _loaded(folder: Path) -> journal.ServerState:
    state = journal.load_state(folder)
    assert state is not None
    return state


def _run_and_die(config: RunConfig, folder: Path, site: str, number: int) -> None:
    """Run until a site is asked in a round, and die there as by a power cut."""

    def die(name: str, round_number: int, reply: Packet) -> Packet:
        if (name, round_number) == (site, number):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(config, RuleSites(die), folder)


def test_a_site_that_replies_twice_counts_once(config: RunConfig, tmp_path: Path) -> None:
    class Stuttering(RuleSites):
        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            for news in super().ask(kind, instructions, timeout_s):
                yield news
                if news is not None and news[0] == "b-ct":
                    spoilt = {key: value * np.nan for key, value in news[1].arrays.items()}
                    yield "b-ct", replace(news[1], arrays=spoilt)
                    yield "b-ct", replace(news[1], arrays={key: 2 * value for key, value in news[1].arrays.items()})

    twice = run(config, Stuttering(), tmp_path / "twice")
    once = run(config, RuleSites(), tmp_path / "once")
    assert model_hash(twice.model) == model_hash(once.model)
    assert twice.strikes_of("b-ct") == 0


def test_a_late_reply_is_corrected_by_the_steps_that_it_was_asked_for(config: RunConfig, tmp_path: Path) -> None:
    train = replace(config.train, local_steps=8, step_budget=True)
    federation = replace(config.federation, clip_factor=100.0, staleness_weight=0.5)
    config = replace(config, train=train, federation=federation, resume=True)
    folder = tmp_path / "run"

    class Late(RuleSites):
        """b-ct sends its reply to round 2 in round 3."""

        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            number = instructions["b-ct"].config["round"]
            if kind == "train" and number == 2:
                self.kept = good_reply("b-ct", instructions["b-ct"])
            elif kind == "train" and number == 3:
                yield "b-ct", self.kept
            slow = kind == "train" and number > 1
            yield from super().ask(kind, {k: p for k, p in instructions.items() if not (slow and k == "b-ct")}, timeout_s)

    def go_on(rounds: int, slowness: float) -> None:
        """To so many rounds, b-ct having needed so many times the others' time for a step."""
        state = begin(replace(config, num_rounds=rounds), folder)
        history = {k: replace(h, step_seconds=(slowness if k == "b-ct" else 1.0,)) for k, h in state.history.items()}
        journal.save_state(folder, replace(state, history=history))
        run(replace(config, num_rounds=rounds), sites, folder)
        (folder / "config.yaml").unlink()  # the next part has another number of rounds
        journal.start_run(folder, replace(config, num_rounds=rounds + 1))

    sites = Late()
    go_on(1, slowness=1.0)
    go_on(2, slowness=4.0)
    go_on(3, slowness=1.0)
    facts = _records(folder)[2]["sites"]["b-ct"]
    assert (facts["status"], facts["steps"], facts["scale"]) == ("late", 2, pytest.approx(0.5 * 8 / 2))


def test_a_late_reply_that_is_not_wanted_is_on_record(config: RunConfig, tmp_path: Path) -> None:
    class Late(RuleSites):
        kept: Packet | None = None

        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            number = next(iter(instructions.values())).config["round"]
            if kind == "train" and number == 1:
                self.kept = good_reply("b-ct", instructions["b-ct"])
                instructions = {name: packet for name, packet in instructions.items() if name != "b-ct"}
            elif kind == "train" and number == 2:
                yield "b-ct", self.kept
            yield from super().ask(kind, instructions, timeout_s)

    for weight, outcome in ((0.0, "dropped"), (0.5, "superseded")):
        federation = replace(config.federation, staleness_weight=weight)
        run(replace(config, num_rounds=2, federation=federation), Late(), tmp_path / outcome)
        facts = _records(tmp_path / outcome)[1]["sites"]["b-ct"]
        assert (facts["status"], facts["late_reply"]) == ("ok", outcome)


@pytest.mark.parametrize("status", ["LEFT_OUT", "SITE_IO", "METRICS_WITHHELD"])
def test_a_site_that_cannot_reply_does_not_hold_the_round_open(config: RunConfig, tmp_path: Path, status: str) -> None:
    """Its task can have no quorum; waiting for one would cost the whole time limit every round."""
    federation = replace(config.federation, deadline_floor_s=0.05, deadline_factor=1.0, max_strikes=1)
    config = replace(config, num_rounds=3, federation=federation)

    class Silent(RuleSites):
        waited = 0

        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            for news in super().ask(kind, instructions, timeout_s):
                number = next(iter(instructions.values())).config["round"]
                if news is not None and kind == "train" and news[0] == "d-pet":
                    if status == "LEFT_OUT" and number == 1:
                        news = "d-pet", replace(news[1], config={})
                    elif status == "METRICS_WITHHELD" or (status == "SITE_IO" and number == 3):
                        news = "d-pet", Packet(config={"error": status})
                if not (news is not None and kind == "train" and news[0] == "b-ct" and number == 3):
                    yield news
            if kind == "train" and number == 3:
                for _ in range(100):
                    time.sleep(0.01)
                    self.waited += 1
                    yield None

    sites = Silent()
    run(config, sites, tmp_path / "run")
    statuses = {name: facts["status"] for name, facts in _records(tmp_path / "run")[2]["sites"].items()}
    assert statuses == {"a-ct": "ok", "b-ct": "NO_REPLY", "c-mri": "ok", "d-pet": status}
    assert sites.waited < 50


def test_a_site_that_never_replies_is_waited_for_in_its_first_rounds_only(config: RunConfig, tmp_path: Path) -> None:
    federation = replace(config.federation, deadline_floor_s=0.05, deadline_factor=1.0)
    config = replace(config, num_rounds=NEW_ROUNDS + 2, federation=federation)

    class Mute(RuleSites):
        def __init__(self) -> None:
            super().__init__()
            self.waited = dict.fromkeys(range(1, config.num_rounds + 1), 0)

        def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
            number = int(next(iter(instructions.values())).config["round"])
            yield from super().ask(kind, {k: p for k, p in instructions.items() if kind != "train" or k != "b-ct"}, timeout_s)
            for _ in range(40 if kind == "train" else 0):
                time.sleep(0.01)
                self.waited[number] += 1
                yield None

    sites = Mute()
    run(config, sites, tmp_path / "run")
    assert [polls == 40 for polls in sites.waited.values()] == [True] * NEW_ROUNDS + [False] * 2


def test_half_of_the_sites_gone_for_two_rounds(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=5)
    gone = RuleSites(lambda name, number, reply: None if name in ("b-ct", "d-pet") and number in (2, 3) else reply)
    state = run(config, gone, tmp_path / "run")
    assert [record["frozen_tasks"] for record in _records(tmp_path / "run")] == [[], ["PET"], ["PET"], [], []]
    assert state.round == 5


def test_a_round_in_which_nobody_is_reached_is_asked_again(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, federation=replace(config.federation, patience_s=60.0))

    state = run(config, CutOff(3), tmp_path / "cut-off")
    assert model_hash(state.model) == model_hash(run(config, RuleSites(), tmp_path / "whole").model)
    assert [record["round"] for record in _records(tmp_path / "cut-off")] == [1, 2, 3]
    impatient = replace(config, federation=replace(config.federation, patience_s=0.0))
    with pytest.raises(NobodyRepliedError, match="round 2: expected at least one site's update"):
        run(impatient, CutOff(3), tmp_path / "impatient")


def test_sites_that_all_fail_stop_the_run_at_once(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, federation=replace(config.federation, patience_s=60.0))
    with pytest.raises(ValueError, match="SITE_IO"):
        run(config, RuleSites(lambda _name, _round, _reply: Packet(config={"error": "SITE_IO"})), tmp_path / "run")


def test_a_moved_folder_and_other_waiting_times_go_on(config: RunConfig, tmp_path: Path) -> None:
    _run_and_die(config, tmp_path / "small" / "run", "c-mri", 2)
    shutil.move(tmp_path / "small" / "run", tmp_path / "big" / "renamed")
    federation = replace(config.federation, round_timeout_s=7.0, num_sites=2, patience_s=1.0)
    moved = replace(config, name="renamed", output_dir=str(tmp_path / "big"), federation=federation, resume=True)
    resumed = run(moved, RuleSites(), tmp_path / "big" / "renamed")
    assert model_hash(resumed.model) == model_hash(run(config, RuleSites(), tmp_path / "whole").model)
    with pytest.raises(ValueError, match="expected the configuration"):
        run(replace(moved, train=replace(config.train, lr=1e-5)), RuleSites(), tmp_path / "big" / "renamed")


def test_without_a_state_that_verifies_nothing_is_thrown_away(config: RunConfig, tmp_path: Path) -> None:
    run(replace(config, num_rounds=3), RuleSites(), tmp_path / "run")
    before = (tmp_path / "run" / "rounds.jsonl").read_text()
    for path in (tmp_path / "run" / "journal").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="got 2 damaged; restore its journal"):
        run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert (tmp_path / "run" / "rounds.jsonl").read_text() == before


@pytest.mark.parametrize("change", ["value", "null"])
def test_a_manifest_that_was_changed_is_found_out(config: RunConfig, tmp_path: Path, change: str) -> None:
    run(config, RuleSites(), tmp_path / "run")
    newest = tmp_path / "run" / "journal" / "000003.json"
    newest.write_text(newest.read_text().replace('"round": 3', '"round": 7') if change == "value" else "null")
    state = journal.load_state(tmp_path / "run")
    assert state is not None
    assert state.round == 2


def test_a_state_of_an_older_version_is_read(config: RunConfig, tmp_path: Path) -> None:
    state = replace(begin(config, tmp_path / "run"), history={"b-ct": SiteHistory((1.0,), (2.0,), (0.5,), 1, 2)})
    journal.save_state(tmp_path / "run", state)
    assert _loaded(tmp_path / "run").history == state.history
    path = tmp_path / "run" / "journal" / "000000.json"
    manifest = json.loads(path.read_text())
    del manifest["seal"], manifest["history"]["b-ct"]["unheard"]
    path.write_text(json.dumps({**manifest, "seal": journal._seal(manifest)}))
    assert _loaded(tmp_path / "run").history == {"b-ct": SiteHistory((1.0,), (2.0,), (0.5,), 1)}


@pytest.mark.parametrize("torn", [b'{"round": 2, "tas', b"\0\0\0\0\n", b"\xff\xfe{\n", b"[1, 2]\n", b'{"seconds": 1}\n'])
def test_a_torn_record_does_not_keep_a_run_from_going_on(config: RunConfig, tmp_path: Path, torn: bytes) -> None:
    _run_and_die(config, tmp_path / "run", "c-mri", 2)
    with open(tmp_path / "run" / "rounds.jsonl", "ab") as file:
        file.write(torn)
    run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert [record["round"] for record in _records(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_spooled_reply_is_asked_for_again(config: RunConfig, tmp_path: Path, damage: str) -> None:
    _run_and_die(config, tmp_path / "run", "c-mri", 2)
    path = tmp_path / "run" / "spool" / "000002" / "a-ct.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    again = RuleSites()
    resumed = run(replace(config, resume=True), again, tmp_path / "run")
    assert [name for kind, number, name in again.asked if (kind, number) == ("train", 2)] == ["a-ct", "c-mri", "d-pet"]
    assert model_hash(resumed.model) == model_hash(run(config, RuleSites(), tmp_path / "whole").model)


def test_replies_of_a_round_that_was_begun_anew_are_not_taken(config: RunConfig, tmp_path: Path) -> None:
    """Round, model and file names are the same; only the nonce tells them apart."""
    _run_and_die(config, tmp_path / "run", "c-mri", 1)
    assert len(list((tmp_path / "run" / "spool" / "000001").glob("*.safetensors"))) == 2
    shutil.rmtree(tmp_path / "run" / "journal")
    (tmp_path / "run" / "journal").mkdir()
    again = RuleSites()
    run(replace(config, resume=True), again, tmp_path / "run")
    assert [name for kind, number, name in again.asked if (kind, number) == ("train", 1)] == list(SITES)


def test_a_resumed_round_keeps_its_nonce(config: RunConfig, tmp_path: Path) -> None:
    before = begin(config, tmp_path / "run")
    assert begin(replace(config, resume=True), tmp_path / "run").nonce == before.nonce
    after = run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert len({before.nonce, after.nonce, begin(config, tmp_path / "other").nonce}) == 3


def test_the_released_model_is_written_again_if_the_coordinator_died_before_it(config: RunConfig, tmp_path: Path) -> None:
    state = run(config, RuleSites(), tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert read_model(tmp_path / "run" / "model.safetensors").sha256 == model_hash(state.average)


def test_scores_that_make_no_sense_choose_no_model(config: RunConfig, tmp_path: Path) -> None:
    def boast(name: str, number: int, reply: Packet) -> Packet:
        worth = {"a-ct": 1e12, "b-ct": float("nan")}.get(name) if number == 2 else None
        return reply if worth is None else replace(reply, metrics={**reply.metrics, "CT.restored.psnr_sum": worth})

    state = run(config, RuleSites(tamper_scores=boast), tmp_path / "run")
    assert state.best_round == 3
    assert state.best_gain_db == pytest.approx(3.0)
    assert set(_records(tmp_path / "run")[1]["site_gain_db"]) == {"c-mri", "d-pet"}


def test_a_gain_over_fewer_tasks_is_not_compared(config: RunConfig, tmp_path: Path) -> None:
    """PET is the hardest task here; a round in which its only site is silent must not look best for that."""

    def hard_pet(name: str, number: int, reply: Packet) -> Packet | None:
        if name != "d-pet":
            return reply
        return None if number == 2 else replace(reply, metrics={**reply.metrics, "PET.restored.psnr_sum": 15.0})

    state = run(config, RuleSites(tamper_scores=hard_pet), tmp_path / "run")
    gains = [record["mean_gain_db"] for record in _records(tmp_path / "run")]
    assert gains[1] > max(gains[0], gains[2])
    assert state.best_round == 3


def test_the_record_says_once_who_came_with_which_versions(config: RunConfig, tmp_path: Path) -> None:
    class Joining(RuleSites):
        rounds = 0

        def members(self, config: RunConfig) -> dict[str, SiteInfo]:
            self.rounds += 1
            version = "0.2" if self.rounds == 4 else "0.1"
            absent = ("d-pet",) if self.rounds == 1 else ()
            return {name: SiteInfo(tasks, "1-10", {"fed_tat": version}) for name, tasks in SITES.items() if name not in absent}

    run(replace(config, num_rounds=4), Joining(), tmp_path / "run")
    records = _records(tmp_path / "run")
    assert [sorted(record.get("came", {})) for record in records] == [["a-ct", "b-ct", "c-mri"], ["d-pet"], [], sorted(SITES)]
    assert records[1]["came"]["d-pet"] == {"patients": "1-10", "fed_tat": "0.1"}
    assert [set(record.get("versions", ())) >= {"fed-tat", "torch", "flwr"} for record in records] == [True, True, False, True]
