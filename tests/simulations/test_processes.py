"""Workers of a simulation end with it."""

from __future__ import annotations

import multiprocessing as mp
import time

import pytest

from simulations.processes import pool_of


def test_an_interrupt_does_not_wait_for_the_work() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted_at_work()
    assert not mp.active_children()


def _interrupted_at_work() -> None:
    with pool_of(1) as pool:
        work = pool.submit(time.sleep, 3600)
        while not work.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
