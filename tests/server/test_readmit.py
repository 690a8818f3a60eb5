"""`tat run readmit`: an operator's request is not lost, whatever happens to the round that it is for."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rule_sites import CutOff, RuleSites

from server import journal
from server.history import SiteHistory
from server.strategy import begin, run
from tat_core.config import RunConfig
from tat_core.packet import Packet


def _statuses(folder: Path) -> list[str]:
    return [json.loads(line)["sites"]["b-ct"]["status"] for line in (folder / "rounds.jsonl").read_text().splitlines()]


def _stale_and_readmitted(folder: Path) -> Callable[[str, int, Packet], Packet]:
    """What spoils b-ct's reply to round 1, after which an operator lets it back."""

    def tamper(name: str, number: int, reply: Packet) -> Packet:
        if (name, number) != ("b-ct", 1):
            return reply
        (folder / "readmit").mkdir(exist_ok=True)
        (folder / "readmit" / "b-ct").touch()
        return replace(reply, config={**reply.config, "round": 0})

    return tamper


def test_a_readmission_survives_a_round_in_which_nobody_is_reached(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, federation=replace(config.federation, patience_s=60.0, max_strikes=1))

    run(config, CutOff(1, _stale_and_readmitted(tmp_path / "run")), tmp_path / "run")
    assert _statuses(tmp_path / "run") == ["STALE", "ok", "ok"]


def test_a_readmission_survives_a_kill(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, federation=replace(config.federation, max_strikes=1))
    tamper = _stale_and_readmitted(tmp_path / "run")

    def die(name: str, number: int, reply: Packet) -> Packet:
        if number == 2:
            raise KeyboardInterrupt
        return tamper(name, number, reply)

    with pytest.raises(KeyboardInterrupt):
        run(config, RuleSites(die), tmp_path / "run")
    run(replace(config, resume=True), RuleSites(), tmp_path / "run")
    assert _statuses(tmp_path / "run") == ["STALE", "ok", "ok"]
    assert not list((tmp_path / "run" / "readmit").iterdir())


def test_a_readmission_that_cannot_be_written_down_is_not_lost(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = replace(begin(config, tmp_path / "run"), history={"b-ct": SiteHistory(strikes=3)})
    journal.save_state(tmp_path / "run", state)
    (tmp_path / "run" / "readmit").mkdir()
    (tmp_path / "run" / "readmit" / "b-ct").touch()

    def is_full(path: Path) -> Path:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "replacing", is_full)
        with pytest.raises(OSError, match="no space"):
            journal.readmit(tmp_path / "run", state)
    assert journal.readmit(tmp_path / "run", state).strikes_of("b-ct") == 0
    saved = journal.load_state(tmp_path / "run")
    assert saved is not None
    assert saved.strikes_of("b-ct") == 0
    assert not list((tmp_path / "run" / "readmit").iterdir())
