"""Between tasks: the conflict-averse direction against CAGrad's own definition, and what any combination must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from server.combine import Gram, combine, conflict_averse

SHARES = np.array([0.2, 0.3, 0.5])
seeds = st.integers(0, 10_000)


def _updates(seed: int, tasks: int = 3, size: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tasks, size))


@given(seeds, st.sampled_from([0.1, 0.4, 0.9]))
@settings(deadline=None, max_examples=30)
def test_it_is_cagrads_direction(seed: int, aversion: float) -> None:
    """CAGrad by its definition: max over d of min over tasks of <Δ_t, d>, with d within c·|g0| of g0, solved directly."""
    updates = _updates(seed)
    mean = SHARES @ updates
    radius = aversion * np.linalg.norm(mean)
    ball = {"type": "ineq", "fun": lambda x: radius**2 - ((x[:-1] - mean) ** 2).sum()}
    worst = {"type": "ineq", "fun": lambda x: updates @ x[:-1] - x[-1]}
    start = np.append(mean, (updates @ mean).min())
    direct = minimize(lambda x: -x[-1], start, constraints=[ball, worst], method="SLSQP", options={"maxiter": 500, "ftol": 1e-12})
    ours = conflict_averse(updates @ updates.T, SHARES, aversion) @ updates
    # Ours has the mean's length: bring it back onto the sphere round the mean for the comparison.
    d = direct.x[:-1] / np.linalg.norm(direct.x[:-1]) * np.linalg.norm(mean)
    assert (updates @ ours).min() >= (updates @ d).min() - 0.02 * np.linalg.norm(mean) * np.linalg.norm(updates, axis=1).max()


@given(seeds)
@settings(deadline=None)
def test_the_length_stays_and_the_worst_task_is_no_worse_off(seed: int) -> None:
    updates = _updates(seed)
    mean = SHARES @ updates
    turned = conflict_averse(updates @ updates.T, SHARES, 0.4) @ updates
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(mean), rel=1e-6)
    assert (updates @ turned).min() >= (updates @ mean).min() - 1e-6


def test_no_aversion_and_no_update_give_the_shares_back() -> None:
    updates = _updates(1)
    assert conflict_averse(updates @ updates.T, SHARES, 0.0) is SHARES
    assert conflict_averse(np.zeros((3, 3)), SHARES, 0.4) is SHARES
    alone = conflict_averse(np.array([[4.0]]), np.array([1.0]), 0.4)
    assert alone == pytest.approx([1.0])


def test_inner_products_are_numpys() -> None:
    rng = np.random.default_rng(0)
    parameters = {
        name: {task: rng.standard_normal(shape).astype(np.float32) for task in ("CT", "MRI", "PET")}
        for name, shape in (("a", (3,)), ("b", (100, 9, 3, 3)), ("c", (8192,)))
    }
    gram = Gram(["PET", "CT", "MRI"])
    for means in parameters.values():
        gram.add(means)
    whole = np.stack([np.concatenate([means[t].ravel() for means in parameters.values()]) for t in gram.tasks]).astype(np.float64)
    np.testing.assert_allclose(gram.products, whole @ whole.T, rtol=1e-4, atol=0.05)
    shares = dict(zip(gram.tasks, SHARES, strict=True))
    step = np.concatenate([combine(means, shares).ravel() for means in parameters.values()])
    assert gram.length(shares) == pytest.approx(np.linalg.norm(step), rel=1e-4)
    assert gram.cosines()["CT-MRI"] == pytest.approx(
        whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1]), abs=1e-4
    )
