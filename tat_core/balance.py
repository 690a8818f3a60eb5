"""The loss balancer: statistics of each task's loss in, task weights and shares of the combined step out. Pure.

A weight acts where tasks meet. Multiplied into the loss of a one-task hospital it does nothing, since Adam divides it out again
(tests/tat_core/test_balance.py shows it); so the server turns it into a share of the combined step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from tat_core.config import BalanceConfig
from tat_core.loss import TaskStats
from tat_core.model.weight_net import learn_weights

# Per round, which is many steps: the paper takes 0.025 and 0.001 per step.
_FAMO_RATE, _FAMO_DECAY = 1.0, 0.01


@dataclass(frozen=True)
class BalanceState:
    """What the balancer remembers between rounds.

    Attributes
    ----------
    means : dict of task name to dict
        Smoothed means of the statistics, by name: ``input``, ``change``, ``loss``, ``gradient``.
    count : dict of task name to int
        Samples seen.
    rounds : int
        Rounds folded in.
    logits : dict of task name to float
        FAMO's.
    network : dict of parameter name to list of float
        The published balancer's network, flattened; empty before its first round.
    """

    means: dict[str, dict[str, float]] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    logits: dict[str, float] = field(default_factory=dict)
    network: dict[str, list[float]] = field(default_factory=dict)


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
    means, counts = dict(state.means), dict(state.count)
    for task, reported in sorted(stats.items()):
        if reported.count:
            means[task] = _smoothed(means.get(task), reported, config.smoothing)
            counts[task] = counts.get(task, 0) + reported.count
    after = replace(state, means=means, count=counts, rounds=state.rounds + 1)
    match config.kind:
        case "equal":
            raw = dict.fromkeys(means, 1.0)
        case "count":
            raw = {task: float(counts[task]) for task in means}
        case "closed_form":
            raw = {task: closed_form_weight(mean["loss"]) for task, mean in means.items()}
        case "published":
            network, raw = learn_weights(state.network, {t: (m["input"], m["change"], m["loss"]) for t, m in means.items()})
            after = replace(after, network=network)
        case "famo":
            logits = _famo_logits(state, means)
            after = replace(after, logits=logits)
            raw = {task: softmax / means[task]["loss"] for task, softmax in _softmax(logits).items()}
        case _:
            raise AssertionError(f"balance kind {config.kind} passed validation")
    mean_raw = sum(raw.values()) / len(raw) if raw else 1.0
    return after, {task: raw[task] / mean_raw for task in sorted(raw)}


def step_shares(
    state: BalanceState, task_weight: Mapping[str, float], tasks: Collection[str], config: BalanceConfig
) -> dict[str, float]:
    """Each reported task's share of the combined step, summing to 1.

    With Adam at the sites every task's update has about the same length whatever its loss. In pooled training a task's share
    of the step is its weight times the length of its gradient, so that is what the share is made here. It stays within
    1/(3T) … 2/T for T tasks and moves there from equal shares over the first ``balance.warmup_rounds``.

    Parameters
    ----------
    state : BalanceState
        After the round.
    task_weight : mapping of task name to float
    tasks : collection of str
        Those that were reported.
    config : BalanceConfig
    """
    names = sorted(tasks)
    equal = 1.0 / len(names)
    if config.kind == "equal":
        return dict.fromkeys(names, equal)
    by_gradient = config.kind != "count" and all(state.means[name]["gradient"] > 0 for name in names)
    raw = {name: task_weight[name] * (state.means[name]["gradient"] if by_gradient else 1.0) for name in names}
    bounded = _bounded(raw, equal / 3, 2 * equal)
    warmth = min(1.0, state.rounds / config.warmup_rounds) if config.warmup_rounds else 1.0
    return {name: (1 - warmth) * equal + warmth * bounded[name] for name in names}


def _bounded(raw: Mapping[str, float], low: float, high: float) -> dict[str, float]:
    """Shares in proportion to `raw`, none outside low … high, summing to 1: what is cut off goes to the others."""
    fixed: dict[str, float] = {}
    while True:
        free = {name: value for name, value in raw.items() if name not in fixed}
        scale = (1.0 - sum(fixed.values())) / sum(free.values()) if free else 0.0
        shares = {name: value * scale for name, value in free.items()}
        over = sum(max(share - high, 0.0) for share in shares.values())
        under = sum(max(low - share, 0.0) for share in shares.values())
        if over == under == 0.0:
            return {name: fixed.get(name, shares.get(name, 0.0)) for name in raw}
        # Cutting the side with the larger excess first never has to be taken back.
        if over >= under:
            fixed |= {name: high for name, share in shares.items() if share > high}
        else:
            fixed |= {name: low for name, share in shares.items() if share < low}


def _smoothed(before: Mapping[str, float] | None, reported: TaskStats, smoothing: float) -> dict[str, float]:
    now = {
        "input": reported.mean_input,
        "change": reported.change_sum / reported.count,
        "loss": reported.mean_loss,
        "gradient": reported.mean_gradient,
    }
    return now if before is None else {name: smoothing * before[name] + (1 - smoothing) * value for name, value in now.items()}


def _famo_logits(state: BalanceState, means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """FAMO (arXiv:2306.03792): tasks whose log loss fell less than the others' get a higher logit."""
    before = {task: state.logits.get(task, 0.0) for task in sorted(means)}
    fell = {
        task: math.log(state.means[task]["loss"] / means[task]["loss"])
        if task in state.means and means[task]["loss"] > 0
        else 0.0
        for task in before
    }
    shares = _softmax(before)
    mean = sum(shares[task] * fell[task] for task in before)
    return {
        task: value - _FAMO_RATE * (shares[task] * (fell[task] - mean) + _FAMO_DECAY * value) for task, value in before.items()
    }


def _softmax(logits: Mapping[str, float]) -> dict[str, float]:
    exponentials = {task: math.exp(value) for task, value in logits.items()}
    total = sum(exponentials.values())
    return {task: value / total for task, value in exponentials.items()}
