"""The loss balancer: statistics of each task's loss in, task weights out. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tat_core.config import BalanceConfig
from tat_core.loss import TaskStats


@dataclass(frozen=True)
class BalanceState:
    """What the balancer remembers between rounds: the smoothed mean loss and the samples seen, by task."""

    loss: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)


def closed_form_weight(loss: float) -> float:
    """Weight that the published balancer converges to for a constant loss: 1 / (ℓ + √(ℓ² + 4ℓ)).

    Its pull weight·ℓ grows like √ℓ, so a task with a hundredfold loss pulls ten times as hard, not a hundred (arXiv:2512.14550).

    Parameters
    ----------
    loss : float
        Mean L1(restored, hq) of the task, in (0, 1].
    """
    return 1.0 / (loss + math.sqrt(loss * loss + 4 * loss) + 1e-8)


def balance(state: BalanceState, stats: Mapping[str, TaskStats], config: BalanceConfig) -> tuple[BalanceState, dict[str, float]]:
    """Fold one round's statistics in and derive every known task's weight.

    Parameters
    ----------
    state : BalanceState
    stats : mapping of task name to TaskStats
        What the sites reported this round; a task without samples keeps what is remembered of it.
    config : BalanceConfig

    Returns
    -------
    state : BalanceState
    task_weight : dict of task name to float
        Mean 1 over the known tasks.
    """
    losses, counts = dict(state.loss), dict(state.count)
    for task, reported in sorted(stats.items()):
        if reported.count:
            before = losses.get(task, reported.mean_loss)
            losses[task] = config.smoothing * before + (1 - config.smoothing) * reported.mean_loss
            counts[task] = counts.get(task, 0) + reported.count
    raw = {task: _raw_weight(config.kind, losses[task], counts[task]) for task in sorted(losses)}
    mean = sum(raw.values()) / len(raw) if raw else 1.0
    return BalanceState(losses, counts), {task: value / mean for task, value in raw.items()}


def _raw_weight(kind: str, loss: float, count: int) -> float:
    match kind:
        case "closed_form":
            return closed_form_weight(loss)
        case "equal":
            return 1.0
        case "count":
            return float(count)
    raise AssertionError(f"balance kind {kind} passed validation")
