"""ε is what another library says it is, and never less than what the other accountant proves."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_core.privacy import epsilon_spent, noise_multiplier_for

HISTORIES = [
    ([(1.0, 0.01, 1000)], 1e-5),
    ([(1.3, 0.2, 300)], 1e-3),
    ([(8.0, 1.0, 300)], 1e-3),
    ([(2.0, 0.05, 20), (3.0, 0.05, 20), (2.0, 0.05, 40), (1.5, 0.1, 10)], 1e-4),
]


def as_events(history) -> dp_event.DpEvent:
    return dp_event.ComposedDpEvent(
        [
            dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
            for sigma, rate, steps in history
        ]
    )


@pytest.mark.parametrize(("history", "delta"), HISTORIES)
def test_epsilon_agrees_with_googles_dp_accounting_within_one_percent(history, delta: float) -> None:
    exact = PLDAccountant(value_discretization_interval=1e-3).compose(as_events(history)).get_epsilon(delta)
    assert epsilon_spent(history, delta, "prv") == pytest.approx(exact, rel=0.01)
    renyi = RdpAccountant().compose(as_events(history)).get_epsilon(delta)
    assert epsilon_spent(history, delta, "rdp") == pytest.approx(renyi, rel=0.01)


@settings(max_examples=6, deadline=None)
@given(sigma=st.floats(0.7, 20), rate=st.floats(0.001, 1.0), steps=st.integers(1, 500), cut=st.integers(0, 500))
def test_splitting_a_history_changes_nothing_and_more_steps_never_cost_less(sigma, rate, steps, cut) -> None:
    cut = min(cut, steps)
    whole = epsilon_spent([(sigma, rate, steps)], 1e-4, "rdp")
    assert epsilon_spent([(sigma, rate, cut), (sigma, rate, steps - cut)], 1e-4, "rdp") == whole
    assert epsilon_spent([(sigma, rate, cut)], 1e-4, "rdp") <= whole
    assert epsilon_spent([(sigma, rate, steps)], 1e-4, "prv") <= whole


@pytest.mark.parametrize("epsilon", [0.1, 2.0, 8.0, 30.0])
@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_the_noise_for_a_budget_fills_it_and_does_not_pass_it(epsilon: float, rate: float) -> None:
    sigma = noise_multiplier_for(epsilon, 1e-4, rate, 300)
    assert 0.99 * epsilon <= epsilon_spent([(sigma, rate, 300)], 1e-4, "rdp") <= epsilon


def test_the_ends_of_the_range() -> None:
    assert epsilon_spent([], 1e-5) == 0
    assert epsilon_spent([(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon_spent([(0.0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon_spent([(0.05, 0.5, 300)], 1e-5) > 1000
    with pytest.raises(ValueError, match="the history is damaged"):
        epsilon_spent([(-1.0, 0.1, 1)], 1e-5)
    with pytest.raises(ValueError, match="expected delta in"):
        epsilon_spent([(1.0, 0.1, 1)], 1.0)
    with pytest.raises(ValueError, match="a budget that noise can keep"):
        noise_multiplier_for(1e-4, 1e-5, 1.0, 1000)
