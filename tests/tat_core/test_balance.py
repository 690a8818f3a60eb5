"""The balancer against the objective that it is the optimum of, and what it must never do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from client.site import load_site
from tat_core.balance import BalanceState, balance, closed_form_weight, step_shares
from tat_core.config import BalanceConfig, load_config
from tat_core.data.prepared import open_split, prepare
from tat_core.loss import TaskStats, balanced_loss, count_by_task, optimal_square_weight, per_sample_l1
from tat_core.model.tat import build_model
from tat_core.train import train

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
    assert {task: mean["loss"] for task, mean in state.means.items()} == {"CT": pytest.approx(0.03), "PET": pytest.approx(0.04)}
    assert set(weights) == {"CT", "PET"}


def test_batch_statistics_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    lq, restored, hq = (torch.rand(5, 1, 8, 8, generator=generator) for _ in range(3))
    loss = per_sample_l1(restored, hq)
    three = torch.stack((per_sample_l1(lq, hq), per_sample_l1(lq, restored), loss), 1)
    stats = count_by_task(("CT", "PET", "CT", "CT", "PET"), three, 0.5)
    assert (stats["CT"].count, stats["PET"].count) == (3, 2)
    assert stats["CT"].loss_sum + stats["PET"].loss_sum == pytest.approx(float(loss.sum()), rel=1e-6)
    assert stats["PET"].mean_input == pytest.approx(float((lq - hq).abs()[[1, 4]].mean()), rel=1e-5)
    assert stats["CT"].loss_square_sum == pytest.approx(float(loss[[0, 2, 3]].square().sum()), rel=1e-5)


def test_the_balanced_loss_is_the_published_formula() -> None:
    loss, w = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 1.5])
    expected = sum(0.5 / (wi**2 + 1e-8) * li + 0.5 * math.log(1 + wi**2) for li, wi in ((0.1, 0.5), (0.3, 1.5))) / 2
    assert float(balanced_loss(loss, w.square())) == pytest.approx(expected, rel=1e-6)


def test_the_published_network_approaches_its_closed_form() -> None:
    stats, config = {"CT": _stats(0.01), "PET": _stats(0.2)}, BalanceConfig(kind="published")
    state, weights = BalanceState(), {}
    for _ in range(20):
        state, weights = balance(state, stats, config)
    _, closed = balance(BalanceState(), stats, BalanceConfig(kind="closed_form"))
    assert weights == {task: pytest.approx(value, rel=0.05) for task, value in closed.items()}


def test_famo_favours_the_task_that_improves_least() -> None:
    config, state = BalanceConfig(kind="famo", smoothing=0.0), BalanceState()
    weights = {}
    for number in range(10):
        state, weights = balance(state, {"CT": _stats(0.1 * 0.8**number), "PET": _stats(0.1)}, config)
    assert weights["PET"] * 0.1 > weights["CT"] * 0.1 * 0.8**9  # weight times loss is FAMO's share
    assert state.logits["PET"] > state.logits["CT"]


@given(
    st.lists(st.tuples(losses, st.floats(1e-6, 1e3)), min_size=1, max_size=4),
    st.sampled_from(["published", "closed_form", "famo", "equal", "count"]),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_shares_sum_to_one_within_their_bounds(facts: list[tuple[float, float]], kind: str, warmup: int) -> None:
    stats = {
        f"T{number}": replace(_stats(loss, 10 + number), gradient_sum=gradient * (10 + number))
        for number, (loss, gradient) in enumerate(facts)
    }
    config = BalanceConfig(kind=kind, warmup_rounds=warmup)
    state, weights = balance(BalanceState(), stats, config)
    shares = step_shares(state, weights, list(stats), config)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(1 / 3 - 1e-9 <= share * len(stats) <= 2 + 1e-9 for share in shares.values())


def test_a_share_is_weight_times_gradient_and_warms_up() -> None:
    stats = {"CT": replace(_stats(0.04), gradient_sum=10.0), "PET": replace(_stats(0.04), gradient_sum=15.0)}
    config = BalanceConfig(kind="closed_form", warmup_rounds=2)
    state, weights = balance(BalanceState(), stats, config)
    assert step_shares(state, weights, stats, config)["PET"] == pytest.approx(0.5 * 0.5 + 0.5 * 0.6)
    state, weights = balance(state, stats, config)
    assert step_shares(state, weights, stats, config)["PET"] == pytest.approx(0.6)


@pytest.mark.parametrize("weight", [0.2, 20.0])
def test_a_weight_at_a_site_of_one_task_is_invisible_to_adam(smoke_hospitals: list[Path], weight: float) -> None:
    """The no-op that makes the weight act in the combination instead (tests/server/test_strategy.py shows that it does there)."""
    # The preset's ε of 1e-12: the awake start begins with gradients so small that the usual 1e-8 sees the factor.
    config = load_config("smoke", ["train.loss=l1"])
    site = load_site(smoke_hospitals[0] / "site.yaml")
    (task,) = site.data
    trained = {}
    for factor in (1.0, weight):
        model = build_model(config.model, 0)
        train(
            model,
            {task: open_split(prepare(site.data[task]), "train")},
            config.train,
            rng=np.random.default_rng(0),
            num_steps=4,
            task_weight={task: factor},
        )
        trained[factor] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in build_model(config.model, 0).parameters()])
    plain, weighted = trained[1.0] - start, trained[weight] - start
    assert float(weighted.norm() / plain.norm()) == pytest.approx(1.0, abs=0.02)
    assert float(plain @ weighted / plain.norm() / weighted.norm()) > 0.98
