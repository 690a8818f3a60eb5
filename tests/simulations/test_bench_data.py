"""The bench measures what it says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from simulations.bench.data import alternate, pairs_per_second, prepare_peak_mib
from tat_core.data.volume import Volume


def test_functions_take_turns_and_the_first_round_is_dropped() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        until = time.process_time() + (0.2 if len(calls) < 3 else 0.02)
        while time.process_time() < until:
            pass

    medians = alternate([slow, lambda: calls.append("fast")], 3)
    assert calls == ["slow", "fast"] * 4
    assert 0.015 < medians[0] < 0.1
    assert medians[1] < 0.01


@pytest.mark.slow
def test_store_and_memory_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Volume(np.zeros((160, 160, 8), np.float32), np.eye(4), "HU")
    monkeypatch.setattr("simulations.bench.data._read_ours", lambda: small)
    assert pairs_per_second(tmp_path) > 1000
    assert 0 < prepare_peak_mib(tmp_path, 2) < 200
