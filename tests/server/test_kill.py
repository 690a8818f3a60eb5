"""SIGKILL at random moments, again and again: the run that was killed ends in the same bits as the one that was not."""

from __future__ import annotations

import json
import multiprocessing as mp
import random
from dataclasses import replace
from pathlib import Path

from rule_sites import RuleSites

from server.journal import load_state
from server.strategy import run
from tat_core.checkpoint import model_hash
from tat_core.config import RunConfig

KILLS = 20


def _run(config: RunConfig, folder: Path) -> None:
    run(config, RuleSites(), folder)


def _num_rounds(folder: Path) -> int:
    record = folder / "rounds.jsonl"
    return record.read_text().count("\n") if record.exists() else 0


def test_twenty_kills_and_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, num_rounds=60, resume=True)
    context = mp.get_context("forkserver")
    moment = random.Random(1)
    killed_in = []
    for _ in range(KILLS):
        child = context.Process(target=_run, args=(config, tmp_path / "killed"))
        child.start()
        # Some rounds further on a slow machine too, and then anywhere within a round.
        awaited = min(_num_rounds(tmp_path / "killed") + moment.choice((0, 1, 2, 4)), config.num_rounds)
        while child.is_alive() and _num_rounds(tmp_path / "killed") < awaited:
            child.join(0.005)
        child.join(moment.uniform(0.0, 0.2))
        child.kill()
        child.join()
        state = load_state(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        killed_in.append(state.round if state else 0)
    resumed = run(config, RuleSites(), tmp_path / "killed")
    whole = run(config, RuleSites(), tmp_path / "whole")
    assert model_hash(resumed.model) == model_hash(whole.model)
    assert model_hash(resumed.average) == model_hash(whole.average)
    assert len({n for n in killed_in if 0 < n < config.num_rounds}) >= 5, killed_in
    lines = (tmp_path / "killed" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, config.num_rounds + 1))
    assert not list((tmp_path / "killed").rglob("*.tmp"))
