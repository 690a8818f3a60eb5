"""The bench's sites are such as the engine accepts."""

from __future__ import annotations

from pathlib import Path

from server.strategy import run
from simulations.bench.engine import SyntheticSites
from tat_core.config import load_config


def test_a_round_of_synthetic_sites_moves_the_model(tmp_path: Path) -> None:
    config = load_config("smoke", ["num_rounds=1"])
    run(config, SyntheticSites(5), tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text().count('"status": "ok"') == 5
