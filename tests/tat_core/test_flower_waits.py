"""Flower still has the defaults that are changed, and takes them."""

from __future__ import annotations

import time

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_and_inflate_object_from_tree, pull_objects

from tat_core.flower_waits import wait_less


def test_a_part_that_is_late_by_a_moment_is_waited_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (pull_objects, pull_and_inflate_object_from_tree)
    for function in functions:
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__ or {}))
    wait_less(*functions)
    ready = time.monotonic() + 0.1

    def pull(name: str) -> bytes:
        if time.monotonic() < ready:
            raise ObjectUnavailableError(name)
        return b"here"

    assert pull_objects(["part"], pull) == {"part": b"here"}
    assert time.monotonic() - ready < 0.6, "Flower's own wait would be 0.8 s or more"
