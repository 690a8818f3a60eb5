"""The one training loop: a lone hospital, the pooled baseline and a federated site all call it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tat_core.config import TrainConfig
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit
from tat_core.dpsgd import PatientSgd
from tat_core.loss import TaskStats, add_stats, count_by_task, objective, per_sample_l1


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` did.

    Attributes
    ----------
    stats : dict of task name to TaskStats
    steps : int
    seconds : float
    """

    stats: dict[str, TaskStats]
    steps: int
    seconds: float


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step counted over the whole run: constant, or cosine from ``lr`` to ``lr_min``."""
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, step / max(1, total_steps))
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress))


def make_optimiser(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as published (arXiv:2512.14550: β = 0.9, 0.99)."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def train(
    model: torch.nn.Module,
    splits: Mapping[str, PreparedSplit],
    config: TrainConfig,
    *,
    rng: np.random.Generator,
    num_steps: int,
    first_step: int = 0,
    total_steps: int | None = None,
    device: str = "cpu",
    optimiser: torch.optim.Optimizer | None = None,
    own: Mapping[str, dict[str, torch.Tensor]] | None = None,
    private: PatientSgd | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a model in place for a fixed number of steps.

    Parameters
    ----------
    model : torch.nn.Module
        Maps lq (B, 1, H, W) in [0, 1] to restored of the same shape.
    splits : mapping of task name to PreparedSplit
        Training slices; a batch draws its samples' tasks uniformly.
    config : TrainConfig
    rng : numpy.random.Generator
        The only source of randomness: the same generator, model and data give the same weights on one machine.
    num_steps, first_step, total_steps : int
        Steps to do now; where they start in the learning-rate schedule, and its length (default: these steps alone).
    device : str
    optimiser : torch.optim.Optimizer, optional
        To go on with its state; a fresh AdamW otherwise.
    own : mapping of task name to (parameter name to tensor), optional
        Parameters that each task has of its own, updated in place. A batch is then of one task, drawn uniformly.
    private : PatientSgd, optional
        Gives the steps' gradients and the statistics instead, with differential privacy; it samples patients and draws noise by
        itself, so that weights do not repeat.
    on_step : callable, optional
        Called with the number of steps done.

    Raises
    ------
    ValueError
        The loss became infinite or NaN; the model must not be used.
    """
    total = total_steps if total_steps is not None else first_step + num_steps
    optimiser = optimiser or make_optimiser(model, config)
    model.to(device).train()
    stats: dict[str, TaskStats] = {}
    started = time.perf_counter()
    for done in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, first_step + done, total)
        drawn, task_own = splits, {}
        if own and any(own.values()):
            task = sorted(splits)[rng.integers(len(splits))]
            drawn, task_own = {task: splits[task]}, own[task]
            _copy({name: model.get_parameter(name) for name in task_own}, task_own)
        if private is not None:
            private.set_gradients(model, drawn, config, device)
        else:
            seen = _set_gradients(model, drawn, config, rng, device)
            stats = add_stats(stats, seen)
            if not all(math.isfinite(s.loss_sum) for s in seen.values()):
                raise ValueError(
                    f"train: expected a finite loss, got another at step {first_step + done}; lower train.lr or check the data"
                )
        optimiser.step()
        _copy(task_own, {name: model.get_parameter(name) for name in task_own})
        if on_step is not None:
            on_step(done + 1)
    if private is not None:
        stats = private.statistics()
    return TrainResult(stats, num_steps, time.perf_counter() - started)


def _set_gradients(
    model: torch.nn.Module, splits: Mapping[str, PreparedSplit], config: TrainConfig, rng: np.random.Generator, device: str
) -> dict[str, TaskStats]:
    """Write the mean gradient of one batch to the parameters' ``.grad``; return the batch's statistics."""
    batch = sample_batch(splits, config.batch_size, config.patch_size, rng)
    lq, hq = batch.lq.to(device), batch.hq.to(device)
    restored = model(lq)
    loss = per_sample_l1(restored, hq)
    model.zero_grad(set_to_none=True)
    objective(loss, config.loss).backward()
    return count_by_task(batch.tasks, lq, restored.detach(), hq, loss.detach())


@torch.no_grad()
def _copy(to: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        to[name].copy_(value)
