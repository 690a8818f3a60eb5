"""The privacy ledger: never less than what left, whatever kills the site, and one account for one patient's images."""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import random
import sqlite3
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from client import ledger
from client.consent import SiteRefusalError
from client.site import PrivacyLimits, Site
from tat_core.data.prepared import PreparedSplit, StoredCase
from tat_core.privacy import epsilon_spent
from tat_core.tasks import TASKS

KILLS = 50
CHARGE = [(1.0, 0.1, 10)]
CASES = ["a" * 64, "b" * 64]


def _site(folder: Path, epsilon: float | None = None, **changes: object) -> Site:
    site = Site("north", {"CT": folder / "CT"}, folder / "state", privacy=PrivacyLimits(epsilon is not None, epsilon))
    return replace(site, **changes)  # type: ignore[arg-type]


def _train_for_ever(folder: Path, begun: Event) -> None:
    """Charge, work, settle, send; what was sent is on record, durably, only after it could have left."""
    begun.set()
    site = _site(folder)
    number = _num_sent(folder)
    with open(folder / "sent", "a") as file:
        while True:
            ledger.reserve(site, f"release-{number}", CASES, "0" * 32, number, CHARGE)
            math.factorial(3000)
            ledger.settle(site, f"release-{number}")
            file.write(f"release-{number}\n")
            file.flush()
            os.fsync(file.fileno())
            number += 1


def _num_sent(folder: Path) -> int:
    sent = folder / "sent"
    return len(sent.read_text().splitlines()) if sent.exists() else 0


def test_fifty_kills_never_count_too_little(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    moment = random.Random(1)
    for _ in range(KILLS):
        begun = context.Event()
        child = context.Process(target=_train_for_ever, args=(tmp_path, begun))
        child.start()
        assert begun.wait(60)
        awaited = _num_sent(tmp_path) + moment.choice((0, 0, 1, 3))
        while _num_sent(tmp_path) < awaited:
            assert child.is_alive()
            child.join(0.001)
        child.join(moment.uniform(0.0, 0.05))
        child.kill()
        child.join()
        charged = {entry["release"] for entry in ledger.rounds(_site(tmp_path))}
        with sqlite3.connect(ledger.ledger_file(_site(tmp_path))) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        sent = (tmp_path / "sent").read_text().splitlines() if _num_sent(tmp_path) else []
        assert set(sent) <= charged
        assert len(charged) <= len(set(sent)) + 1, "the round that was killed is charged once, not once a kill"
    assert len(sent) >= 10
    spent = ledger.account(_site(tmp_path), CASES, "rdp")
    assert spent.epsilon >= epsilon_spent(CHARGE * len(sent), 1e-5, "rdp") > 0


def _reserve_one(folder: Path, release: str) -> str:
    try:
        ledger.reserve(_site(folder, 1.01 * epsilon_spent(CHARGE * 3, 1e-5, "rdp")), release, CASES, "0" * 32, 1, CHARGE)
    except SiteRefusalError as error:
        return error.code
    return "ok"


def test_two_processes_cannot_both_take_the_last_of_a_budget(tmp_path: Path) -> None:
    with mp.get_context("forkserver").Pool(4) as pool:
        answers = pool.starmap(_reserve_one, [(tmp_path, f"r{n}") for n in range(12)])
    assert sorted(answers) == ["BUDGET_SPENT"] * 9 + ["ok"] * 3


def test_one_shared_case_is_the_same_account(tmp_path: Path) -> None:
    site = _site(tmp_path)
    ledger.reserve(site, "first", ["a" * 64, "b" * 64], "0" * 32, 1, CHARGE)
    ledger.reserve(site, "unprotected", ["b" * 64], "1" * 32, 1, None)
    grown = ledger.account(site, ["b" * 64, "c" * 64], "rdp")
    assert (grown.private, grown.unprotected, grown.unsettled) == (1, 1, 2)
    assert grown.epsilon == epsilon_spent(CHARGE, 1e-5, "rdp")
    assert ledger.account(site, ["c" * 64], "rdp").epsilon == 0.0


def test_a_patient_with_new_images_or_those_of_another_task_has_one_account(tmp_path: Path) -> None:
    site = _site(tmp_path)
    ct, pet, others = (
        PreparedSplit(TASKS[task], [StoredCase(sha, patient, np.zeros((2, 1, 8, 8), np.float32), sha * 64)])
        for task, patient, sha in (("CT", "anna", "a"), ("PET", "anna", "b"), ("PET", "bert", "c"))
    )
    ledger.reserve(site, "first", ledger.marks_of([ct]), "0" * 32, 1, CHARGE)
    assert ledger.account(site, ledger.marks_of([pet]), "rdp").epsilon == epsilon_spent(CHARGE, 1e-5, "rdp")
    assert ledger.account(site, ledger.marks_of([others]), "rdp").epsilon == 0.0
    assert b"anna" not in ledger.ledger_file(site).read_bytes()


def test_rounds_a_day_count_releases_and_not_repeats(tmp_path: Path) -> None:
    site = _site(tmp_path, max_rounds_per_day=2)
    for release in ("one", "two", "one"):
        ledger.reserve(site, release, CASES, "0" * 32, 1, None)
    with pytest.raises(SiteRefusalError, match="TOO_MANY_ROUNDS"):
        ledger.reserve(site, "three", CASES, "0" * 32, 1, None)


def test_a_damaged_ledger_stops_training(tmp_path: Path) -> None:
    site = _site(tmp_path)
    site.state_dir.mkdir()
    ledger.ledger_file(site).write_bytes(b"not a database" * 100)
    with pytest.raises(OSError, match="ledger"):
        ledger.reserve(site, "one", CASES, "0" * 32, 1, CHARGE)
