"""What differential privacy has cost: ε of a history of noisy releases, and the noise that a budget asks for.

The sole importer of opacus, whose accountants do the maths. The mechanism that is accounted for is in tat_core/dpsgd.py: each
step samples every patient with the same probability and adds Gaussian noise to the sum of what the sampled ones give.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

History = Sequence[tuple[float, float, int]]
"""(noise multiplier, sample rate, number of steps) of each stretch of equal steps, as opacus keeps it; in any order."""

_PRV_UP_TO = 50.0  # its tables grow with ε, and above this nobody asks for the second digit


def epsilon_spent(history: History, delta: float, kind: str = "prv") -> float:
    """ε of everything in a history together, at a given δ.

    Two patients' sets are neighbours if one has one patient more. **Gate on "rdp"**: it needs no numerical integration, never
    decreases when steps are added, and is what `noise_multiplier_for` fills. **Report "prv"**: it is some 10 % smaller
    and as true, but computed by Fourier transforms.

    Parameters
    ----------
    history : sequence of (float, float, int)
        Noise multiplier (standard deviation over sensitivity), probability with which a patient is sampled, steps.
    delta : float
        In (0, 1); below 1 / number of patients.
    kind : str
        ``"rdp"`` (Rényi, Mironov et al., arXiv:1908.10530) or ``"prv"`` (Gopi et al., arXiv:2106.02848; upper bound).

    Returns
    -------
    float
        0 for an empty history, infinite if any step was without noise.

    Raises
    ------
    ValueError
        A number out of its range.
    """
    for sigma, rate, steps in history:
        if not (sigma >= 0 and 0 <= rate <= 1 and steps >= 0):
            raise ValueError(
                f"epsilon: expected (noise multiplier >= 0, rate in [0, 1], steps >= 0), got {(sigma, rate, steps)}; "
                "the history is damaged"
            )
    _check_delta(delta)
    merged: Counter[tuple[float, float]] = Counter()
    for sigma, rate, steps in history:
        if rate and steps:
            merged[sigma, rate] += steps
    if not merged:
        return 0.0
    if any(sigma == 0 for sigma, _ in merged):
        return math.inf
    stretches = [(sigma, rate, steps) for (sigma, rate), steps in sorted(merged.items())]
    rdp = _spent("rdp", stretches, delta, alphas=_orders())
    if kind == "rdp" or rdp > _PRV_UP_TO:
        return rdp
    if kind != "prv":
        raise ValueError(f"epsilon: expected kind prv or rdp, got {kind!r}; choose one of them")
    return min(rdp, _spent("prv", stretches, delta, eps_error=0.002 * max(rdp, 0.1)))


def noise_multiplier_for(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """The noise multiplier with which so many steps fill a budget: "rdp" `epsilon_spent` is below `epsilon` by at most 0.5 %.

    Raises
    ------
    ValueError
        A number out of its range, or a budget that no noise can keep.
    """
    from opacus.accountants.utils import get_noise_multiplier

    if not (epsilon > 0 and 0 < sample_rate <= 1 and num_steps > 0):
        raise ValueError(
            f"noise: expected epsilon > 0, rate in (0, 1], steps > 0, got {(epsilon, sample_rate, num_steps)}; correct them"
        )
    _check_delta(delta)
    try:
        return float(
            get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=num_steps,
                accountant="rdp",
                epsilon_tolerance=0.005 * epsilon,
                alphas=_orders(),
            )
        )
    except ValueError:
        raise ValueError(
            f"noise: expected a budget that noise can keep, got epsilon {epsilon} at delta {delta}; raise epsilon or delta"
        ) from None


def _spent(mechanism: str, stretches: list[tuple[float, float, int]], delta: float, **options: Any) -> float:
    from opacus.accountants import create_accountant  # imported late: it brings all of opacus, a second

    accountant = create_accountant(mechanism)
    accountant.history = stretches
    with np.errstate(divide="ignore"):  # log(1 - rate) at rate 1
        return float(accountant.get_epsilon(delta, **options))


def _orders() -> list[float]:
    """Opacus' Rényi orders, and larger ones for small budgets."""
    from opacus.accountants import RDPAccountant

    return [*RDPAccountant.DEFAULT_ALPHAS, 64, 96, 128]


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"epsilon: expected delta in (0, 1), got {delta}; choose one below 1 / number of patients")
