"""The balancer against the objective that it is the optimum of, and what it must never do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from tat_core.balance import BalanceState, balance, closed_form_weight
from tat_core.config import BalanceConfig
from tat_core.loss import TaskStats, balanced_loss, count_by_task, optimal_square_weight, per_sample_l1

losses = st.floats(1e-4, 1.0)


def _stats(loss: float, count: int = 10) -> TaskStats:
    return TaskStats(count, 0.1 * count, 0.1 * count, loss * count, loss * loss * count)


@given(losses)
def test_the_closed_form_is_the_minimum_of_the_published_objective(loss: float) -> None:
    found = minimize_scalar(
        lambda log_u: 0.5 * loss / math.exp(log_u) + 0.5 * math.log1p(math.exp(log_u)), bounds=(-12, 4), method="bounded"
    )
    u = float(optimal_square_weight(torch.tensor(loss, dtype=torch.float64)))
    assert u == pytest.approx(math.exp(found.x), rel=1e-3)
    assert closed_form_weight(loss) == pytest.approx(0.5 / u, rel=1e-5)


@given(losses, losses)
def test_a_higher_loss_pulls_harder_but_less_than_in_proportion(a: float, b: float) -> None:
    low, high = sorted((a, b))
    pull = [closed_form_weight(loss) * loss for loss in (low, high)]
    assert pull[0] <= pull[1] * (1 + 1e-9)
    assert pull[1] / pull[0] <= high / low * (1 + 1e-9)


def test_weights_have_mean_one_and_follow_their_kind() -> None:
    stats = {"CT": _stats(0.01, 10), "PET": _stats(0.04, 30)}
    _, closed = balance(BalanceState(), stats, BalanceConfig(kind="closed_form"))
    _, equal = balance(BalanceState(), stats, BalanceConfig(kind="equal"))
    _, count = balance(BalanceState(), stats, BalanceConfig(kind="count"))
    assert closed["CT"] > closed["PET"]
    assert equal == {"CT": 1.0, "PET": 1.0}
    assert count == {"CT": pytest.approx(0.5), "PET": pytest.approx(1.5)}
    assert sum(closed.values()) == pytest.approx(2.0)


def test_an_unreported_task_keeps_what_is_remembered_of_it() -> None:
    config = BalanceConfig(smoothing=0.5)
    state, _ = balance(BalanceState(), {"CT": _stats(0.02), "PET": _stats(0.04)}, config)
    state, weights = balance(state, {"CT": _stats(0.04)}, config)
    assert state.loss == {"CT": pytest.approx(0.03), "PET": pytest.approx(0.04)}
    assert set(weights) == {"CT", "PET"}


def test_batch_statistics_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    lq, restored, hq = (torch.rand(5, 1, 8, 8, generator=generator) for _ in range(3))
    loss = per_sample_l1(restored, hq)
    stats = count_by_task(("CT", "PET", "CT", "CT", "PET"), lq, restored, hq, loss)
    assert (stats["CT"].count, stats["PET"].count) == (3, 2)
    assert stats["CT"].loss_sum + stats["PET"].loss_sum == pytest.approx(float(loss.sum()), rel=1e-6)
    assert stats["PET"].mean_input == pytest.approx(float((lq - hq).abs()[[1, 4]].mean()), rel=1e-5)
    assert stats["CT"].loss_square_sum == pytest.approx(float(loss[[0, 2, 3]].square().sum()), rel=1e-5)


def test_the_balanced_loss_is_the_published_formula() -> None:
    loss, w = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 1.5])
    expected = sum(0.5 / (wi**2 + 1e-8) * li + 0.5 * math.log(1 + wi**2) for li, wi in ((0.1, 0.5), (0.3, 1.5))) / 2
    assert float(balanced_loss(loss, w.square())) == pytest.approx(expected, rel=1e-6)
