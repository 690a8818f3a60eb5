"""A site that trains with differential privacy and is killed fifty times: ledger, kept replies and audit log."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import sqlite3
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from client import audit, ledger
from client.site import Site, load_site
from client.work import agreed_splits, handle, train_round
from tat_core.checkpoint import arrays_of, model_hash
from tat_core.config import load_config
from tat_core.model.tat import build_model
from tat_core.packet import Packet
from tat_core.privacy import epsilon_spent

KILLS = 50
CONFIG = load_config("smoke", ["privacy.enabled=true", "privacy.noise_multiplier=2.0", "num_rounds=1000"])


def _site(folder: Path, hospital: Path) -> Site:
    return replace(load_site(hospital / "site.yaml"), state_dir=folder / "state")


def _sent(folder: Path) -> list[tuple[int, str]]:
    """Round and hash of every reply that left, also of one that left again."""
    path = folder / "sent"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(number), digest) for number, digest in (line.split() for line in lines)]


def _train_for_ever(folder: Path, hospital: Path, begun: Event) -> None:
    """Answer a coordinator that asks for each round until it has the reply."""
    begun.set()
    site, model = _site(folder, hospital), arrays_of(build_model(CONFIG.model, 1))
    number = 1 + max((number for number, _ in _sent(folder)), default=0)
    words = {"run": "0" * 32, "nonce": "n", "base": model_hash(model), "steps": CONFIG.train.local_steps}
    while True:
        reply = handle(train_round, site, CONFIG, Packet(model, {}, words | {"round": number}))
        assert reply.error is None, reply.error
        with open(folder / "sent", "a") as file:
            file.write(f"{number} {model_hash(reply.arrays)}\n")
            file.flush()
            os.fsync(file.fileno())
        number += 1


@pytest.mark.slow
def test_fifty_kills_of_a_site_that_trains(smoke_hospitals: list[Path], tmp_path: Path) -> None:
    site = _site(tmp_path, smoke_hospitals[0])
    context = mp.get_context("forkserver")
    moment = random.Random(1)
    unsettled = 0
    for _ in range(KILLS):
        begun = context.Event()
        child = context.Process(target=_train_for_ever, args=(tmp_path, smoke_hospitals[0], begun))
        child.start()
        assert begun.wait(60)
        child.join(moment.uniform(0.0, 2.0))
        assert child.is_alive(), "the site refused or failed"
        child.kill()
        child.join()
        if ledger.ledger_file(site).exists():
            with sqlite3.connect(ledger.ledger_file(site)) as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rounds = ledger.rounds(site)
        sent = dict(_sent(tmp_path))
        assert len(set(_sent(tmp_path))) == len(sent), "a round left twice, with other noise"
        assert set(sent) <= {entry["round"] for entry in rounds}
        assert len(rounds) <= len(sent) + 1, "the round that was killed is charged once, not once a kill"
        unsettled += any(not entry["settled"] for entry in rounds)
        audit.verify(audit.audit_file(site))
    assert len(sent) >= 10
    assert unsettled >= 5, "hardly any kill hit a round that was under way"
    charges = [tuple(stretch) for entry in rounds for stretch in entry["history"]]
    spent = ledger.account(site, ledger.marks_of(agreed_splits(site, CONFIG).values()), "rdp")
    assert spent.epsilon == epsilon_spent(charges, site.privacy.delta, "rdp") > 0
    logged = {entry["sha256"] for entry in audit.read(audit.audit_file(site)) if "sha256" in entry}
    assert set(sent.values()) <= logged
