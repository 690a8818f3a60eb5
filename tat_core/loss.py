"""Per-sample losses and the additive statistics that a site reports about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

EPSILON = 1e-8


@dataclass(frozen=True)
class TaskStats:
    """Sums over the training samples of one task; two of them add up to the statistics of both.

    Attributes
    ----------
    count : int
        Samples seen.
    input_sum, change_sum, loss_sum : float
        Σ L1(lq, hq), Σ L1(lq, restored), Σ L1(restored, hq); each term is in [0, 1].
    loss_square_sum : float
        Σ L1(restored, hq)².
    """

    count: int = 0
    input_sum: float = 0.0
    change_sum: float = 0.0
    loss_sum: float = 0.0
    loss_square_sum: float = 0.0

    def __add__(self, other: TaskStats) -> TaskStats:
        return TaskStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def mean_loss(self) -> float:
        """Mean L1(restored, hq) of the samples seen."""
        return self.loss_sum / self.count

    @property
    def mean_input(self) -> float:
        """Mean L1(lq, hq) of the samples seen: the loss of doing nothing."""
        return self.input_sum / self.count


def per_sample_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each sample.

    Parameters
    ----------
    a, b : torch.Tensor, shape (B, ...)

    Returns
    -------
    torch.Tensor, shape (B,)
    """
    return (a - b).abs().flatten(1).mean(1)


def optimal_square_weight(loss: torch.Tensor) -> torch.Tensor:
    """Closed-form optimum w² of the published balancer for a constant loss: (ℓ + √(ℓ² + 4ℓ)) / 2.

    It minimises 0.5·ℓ/w² + 0.5·log(1 + w²), the objective of TAT's balancer (arXiv:2512.14550).
    """
    return (loss + torch.sqrt(loss * loss + 4 * loss)) / 2


def balanced_loss(loss: torch.Tensor, square_weight: torch.Tensor) -> torch.Tensor:
    """The published balanced loss, mean_i[0.5/(w_i² + 1e-8)·ℓ_i + 0.5·log(1 + w_i²)].

    Parameters
    ----------
    loss, square_weight : torch.Tensor, shape (B,)
        ℓ_i and w_i².

    Returns
    -------
    torch.Tensor, scalar
    """
    return (0.5 / (square_weight + EPSILON) * loss + 0.5 * torch.log(1 + square_weight)).mean()


def objective(loss: torch.Tensor, kind: str) -> torch.Tensor:
    """What a step minimises, from each sample's loss (B,): the mean ("l1") or the published balance of it ("balanced")."""
    return loss.mean() if kind == "l1" else balanced_loss(loss, optimal_square_weight(loss.detach()))


def count_by_task(
    tasks: Sequence[str], lq: torch.Tensor, restored: torch.Tensor, hq: torch.Tensor, loss: torch.Tensor
) -> dict[str, TaskStats]:
    """Statistics of one batch, by task.

    Parameters
    ----------
    tasks : sequence of str, length B
    lq, restored, hq : torch.Tensor, shape (B, 1, H, W)
    loss : torch.Tensor, shape (B,)
        L1(restored, hq), which the training step has computed already.
    """
    with torch.no_grad():
        columns = zip(per_sample_l1(lq, hq).tolist(), per_sample_l1(lq, restored).tolist(), loss.tolist(), strict=True)
    stats: dict[str, TaskStats] = {}
    for task, (input_l1, change, value) in zip(tasks, columns, strict=True):
        stats[task] = stats.get(task, TaskStats()) + TaskStats(1, input_l1, change, value, value * value)
    return stats


def add_stats(a: Mapping[str, TaskStats], b: Mapping[str, TaskStats]) -> dict[str, TaskStats]:
    """Sum of two by-task statistics."""
    return {task: a.get(task, TaskStats()) + b.get(task, TaskStats()) for task in sorted({*a, *b})}
