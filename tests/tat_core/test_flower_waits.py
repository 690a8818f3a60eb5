"""Flower still has the defaults that are changed, and takes them."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_and_inflate_object_from_tree, pull_objects

from tat_core.flower_waits import wait_less


def test_a_part_that_is_not_there_yet_is_looked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (pull_objects, pull_and_inflate_object_from_tree)
    for function in functions:
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__ or {}))
    wait_less(*functions)
    slept, answers = [], [b"here", *[None] * 8]

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            slept.append(timeout)
            return False

    def pull(name: str) -> bytes:
        answer = answers.pop()
        if answer is None:
            raise ObjectUnavailableError(name)
        return answer

    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Stop, Lock=threading.Lock))
    assert pull_objects(["part"], pull) == {"part": b"here"}
    assert slept == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0], rel=0.21), "with Flower's jitter of a fifth"
