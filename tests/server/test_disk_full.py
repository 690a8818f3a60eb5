"""A disk that fills up during a run: it stops, trusts nothing partial, and goes on to the same bits when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rule_sites import RuleSites

from server.journal import load_state
from server.strategy import run
from tat_core.checkpoint import model_hash
from tat_core.config import RunConfig


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 14 MB, less than a few rounds of the smoke model take."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(config: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    config = replace(config, num_rounds=6)
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    with pytest.raises(OSError, match="space"):
        run(config, RuleSites(), small_disk / "run")
    state = load_state(small_disk / "run")
    stopped_after = state.round if state else 0
    assert stopped_after < config.num_rounds
    assert not list((small_disk / "run").rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    resumed = run(replace(config, resume=True), RuleSites(), small_disk / "run")
    whole = run(config, RuleSites(), tmp_path / "whole")
    assert model_hash(resumed.model) == model_hash(whole.model)
