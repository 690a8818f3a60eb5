"""Processes that are kept running: what ends takes its group with it, pauses grow, and nothing is left when they are stopped."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from client import supervise
from client.supervise import Group, keep_running

WAIT_S = 30.0
IGNORES_SIGTERM = ["sh", "-c", "trap '' TERM; sleep 100 & while :; do wait; done"]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fed_tat", "fed_tat.launcher"):  # a log that stays at the site does not propagate
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO, "fed_tat.launcher")


def _group(pause_s: float, **commands: list[str]) -> Group:
    return Group(lambda: commands, os.environ, pause_s)


def _look_until(group: Group, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        group.look()
        time.sleep(0.02)


def _children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.name() in {"sh", "sleep"}]


def test_what_ends_takes_the_others_with_it_and_all_start_again(caplog: pytest.LogCaptureFixture) -> None:
    group = _group(0.1, first=["sleep", "100"], second=["sleep", "101"])
    _look_until(group, lambda: len(_children()) == 2, "both run")
    before = {process.pid for process in _children()}
    _children()[0].kill()
    _look_until(group, lambda: len(_children()) == 2 and before.isdisjoint(p.pid for p in _children()), "two new ones run")
    group.stop()
    assert _children() == []
    assert "ended with code -9; next start in 0.1 s" in caplog.text


def test_pauses_double_up_to_the_longest(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's node exits with 1 (its own 305) as long as the SuperLink believes that it is still there, for about a minute."""
    monkeypatch.setattr(supervise, "LONGEST_PAUSE_S", 0.3)
    group = _group(0.1, node=["sh", "-c", "exit 1"])
    _look_until(group, lambda: caplog.text.count("ended with code 1") == 4, "four ends")
    group.stop()
    pauses = [float(record.args[2]) for record in caplog.records if "next start" in record.msg]  # type: ignore[index,arg-type]
    assert pauses == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_a_group_that_lasted_is_started_again_soon(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LONGEST_PAUSE_S", 0.3)
    group = _group(0.01, node=["sh", "-c", "sleep 0.5"])
    _look_until(group, lambda: caplog.text.count("ended with code 0") == 3, "three ends")
    group.stop()
    pauses = [record.args[2] for record in caplog.records if "next start" in record.msg]  # type: ignore[index]
    assert pauses == [0.01, 0.01, 0.01]


def test_stop_ends_what_does_not_want_to_and_what_that_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.3)
    group = _group(0.1, stubborn=IGNORES_SIGTERM)
    _look_until(group, lambda: len(_children()) == 2, "it and its child run")
    group.stop()
    deadline = time.monotonic() + WAIT_S
    while _children():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_they_print_is_in_our_log_until_they_are_stopped(caplog: pytest.LogCaptureFixture) -> None:
    stopping = threading.Event()
    group = _group(0.1, talker=["sh", "-c", "echo good day; echo trouble >&2; sleep 100"])
    keeper = threading.Thread(target=keep_running, args=([group], stopping))
    keeper.start()
    deadline = time.monotonic() + WAIT_S
    while "talker: trouble" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    stopping.set()
    keeper.join(WAIT_S)
    assert "talker: good day" in caplog.text
    assert "talker: trouble" in caplog.text
    assert caplog.records[-1].message == "stopped"
    assert _children() == []
