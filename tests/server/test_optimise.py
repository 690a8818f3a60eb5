"""The server's optimisers against torch's, which implement the same recursions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.history import NEW_ROUNDS, SiteHistory, deadline_s, steps_for
from server.optimise import Moments, advance


def test_momentum_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    value, moments = rng.standard_normal(7).astype(np.float32), Moments()
    parameter = torch.nn.Parameter(torch.from_numpy(value.copy()))
    reference = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    for _ in range(5):
        update = rng.standard_normal(7).astype(np.float32)
        value, moments = advance("momentum", value, update, moments, 0.3)
        parameter.grad = -torch.from_numpy(update)
        reference.step()
    np.testing.assert_allclose(value, parameter.detach().numpy(), rtol=1e-5)


def test_adam_is_fedadam_of_the_paper() -> None:
    update = np.array([1.0, -2.0], np.float32)
    value, moments = advance("adam", np.zeros(2, np.float32), update, Moments(), 0.1)
    np.testing.assert_allclose(value, 0.1 * 0.1 * update / (np.sqrt(0.01 * update**2) + 1e-3), rtol=1e-5)
    value, moments = advance("adam", value, -update, moments, 0.1)
    np.testing.assert_allclose(moments.first, 0.9 * 0.1 * update - 0.1 * update, rtol=1e-5)


def test_the_deadline_follows_the_slowest_and_waits_for_the_unknown() -> None:
    history = {"a": SiteHistory(seconds=(10.0, 12.0, 300.0)), "b": SiteHistory(seconds=(30.0,))}
    assert deadline_s(history, ["a", "b"], ["a", "b"], 3.0, 60.0, 3600.0) == pytest.approx(90.0)
    assert deadline_s(history, ["a"], ["a"], 3.0, 60.0, 3600.0) == pytest.approx(60.0)
    assert deadline_s(history, ["a", "b"], ["a", "b"], 3.0, 60.0, 80.0) == pytest.approx(80.0)
    assert deadline_s(history, ["a", "new"], ["a", "new"], 3.0, 60.0, 3600.0) == pytest.approx(3600.0)


def test_the_deadline_waits_for_nobody_who_has_answered_or_never_does() -> None:
    history = {"a": SiteHistory(seconds=(30.0,)), "mute": SiteHistory(unheard=NEW_ROUNDS - 1)}
    assert deadline_s(history, ["a", "new"], ["a"], 3.0, 60.0, 3600.0) == pytest.approx(90.0)
    assert deadline_s(history, ["a", "mute"], ["mute"], 3.0, 60.0, 3600.0) == pytest.approx(3600.0)
    history["mute"] = history["mute"].missed()
    assert deadline_s(history, ["a", "mute"], ["mute"], 3.0, 60.0, 3600.0) == pytest.approx(90.0)
    assert deadline_s(history, ["mute"], ["mute"], 3.0, 60.0, 3600.0) == pytest.approx(3600.0)


def test_a_slow_site_gets_what_its_median_fellow_has_time_for() -> None:
    history = {name: SiteHistory(step_seconds=(rate,)) for name, rate in {"a": 1.0, "b": 1.0, "c": 2.0, "d": 50.0}.items()}
    assert [steps_for(name, list(history), history, 100) for name in history] == [100, 100, 75, 25]
    assert steps_for("new", [*history, "new"], history, 100) == 100
