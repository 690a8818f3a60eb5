"""The one training loop: a lone hospital, the pooled baseline and a federated site all call it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tat_core.config import TrainConfig
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import PreparedSplit
from tat_core.dpsgd import PatientSgd
from tat_core.loss import EPSILON, TaskStats, add_stats, balanced_loss, count_by_task, optimal_square_weight, per_sample_l1
from tat_core.model.weight_net import WeightNet


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


class DivergedError(ValueError):
    """The loss became infinite or NaN: the weights are of no use."""


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step counted over the whole run: constant, or cosine from ``lr`` to ``lr_min``."""
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, step / max(1, total_steps))
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress))


def make_optimiser(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as published (arXiv:2512.14550: β = 0.9, 0.99)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=config.lr, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )


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
    task_weight: Mapping[str, float] | None = None,
    weight_net: WeightNet | None = None,
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
        Parameters that each task has of its own, updated in place. A batch is then of one task, drawn uniformly. The optimiser's
        state of them is each task's own too, under the task's name in ``optimiser.state``, and so in its ``state_dict()``.
    task_weight : mapping of task name to float, optional
        Factor of each sample's loss by its task, where ``train.loss`` is l1; 1 where absent. It matters at sites with several
        tasks alone: Adam does not see a factor that all samples share.
    weight_net : WeightNet, optional
        The published balancer's network, for ``train.loss`` balanced: trained along with the model if the optimiser has its
        parameters. Without it, the closed form of its optimum.
    private : PatientSgd, optional
        Gives the steps' gradients and the statistics instead, with differential privacy; it samples patients and draws noise by
        itself, so that weights do not repeat. Clipping cancels every factor of a loss: weights do not act.
    on_step : callable, optional
        Called with the number of steps done.

    Raises
    ------
    DivergedError
        The loss became infinite or NaN; the model must not be used.
    """
    total = total_steps if total_steps is not None else first_step + num_steps
    optimiser = optimiser or make_optimiser(model, config)
    model.to(device).train()
    anchors = _anchors(model, own or {}) if config.proximal else []
    stats: dict[str, TaskStats] = {}
    started = time.perf_counter()
    for done in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, first_step + done, total)
        task, drawn, task_own = "", splits, {}
        if own and any(own.values()):
            task = sorted(splits)[rng.integers(len(splits))]
            drawn, task_own = {task: splits[task]}, own[task]
        parameters = {name: model.get_parameter(name) for name in task_own}
        _copy(parameters, task_own)
        _give_state(optimiser.state, task, parameters)
        optimiser.zero_grad(set_to_none=True)
        if private is not None:
            private.set_gradients(model, drawn, config.patch_size, device)
        else:
            seen = _set_gradients(model, drawn, config, rng, device, task_weight or {}, weight_net)
            if not all(math.isfinite(s.loss_sum) for s in seen.values()):
                raise DivergedError(
                    f"train: expected a finite loss, got another at step {first_step + done}; lower train.lr or check the data"
                )
            stats = add_stats(stats, seen)
        for parameter, anchor in anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=config.proximal)
        optimiser.step()
        _copy(task_own, parameters)
        _keep_state(optimiser.state, task, parameters)
        if on_step is not None:
            on_step(done + 1)
    if private is not None:
        stats = private.statistics(num_steps * config.batch_size)
    return TrainResult(stats, num_steps, time.perf_counter() - started)


def _set_gradients(
    model: torch.nn.Module,
    splits: Mapping[str, PreparedSplit],
    config: TrainConfig,
    rng: np.random.Generator,
    device: str,
    task_weight: Mapping[str, float],
    weight_net: WeightNet | None,
) -> dict[str, TaskStats]:
    """Write the gradient of one batch to the parameters' ``.grad``; return the batch's statistics."""
    batch = sample_batch(splits, config.batch_size, config.patch_size, rng)
    lq, hq = batch.lq.to(device), batch.hq.to(device)
    restored = model(lq)
    loss = per_sample_l1(restored, hq)
    three = torch.stack((per_sample_l1(lq, hq), per_sample_l1(lq, restored.detach()), loss.detach()), 1)
    objective, factor = _objective(loss, three, batch.tasks, config, task_weight, weight_net)
    objective.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return count_by_task(batch.tasks, three, float(norm) / factor)


def _objective(
    loss: torch.Tensor,
    stats: torch.Tensor,
    tasks: Sequence[str],
    config: TrainConfig,
    task_weight: Mapping[str, float],
    weight_net: WeightNet | None,
) -> tuple[torch.Tensor, float]:
    """What a step minimises, and the mean factor that it puts on the samples' losses."""
    if config.loss == "l1":
        weights = loss.new_tensor([task_weight.get(task, 1.0) for task in tasks])
        return (weights * loss).mean(), float(weights.mean())
    square = optimal_square_weight(loss.detach()) if weight_net is None else weight_net(stats).square()
    return balanced_loss(loss, square), float((0.5 / (square.detach() + EPSILON)).mean())


def _anchors(
    model: torch.nn.Module, own: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """The shared parameters, and copies of them as they are now."""
    names = {name for values in own.values() for name in values}
    return [(p, p.detach().clone()) for name, p in model.named_parameters() if name not in names]


@torch.no_grad()
def _copy(to: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        to[name].copy_(value)


def _give_state(state: dict[Any, Any], task: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Let the optimiser go on with a task's state of its own parameters.

    What was not kept by task, as of a site with one task before there was such a state, goes on with the task that comes first.
    """
    kept = state.get(task, {})
    for name, parameter in parameters.items():
        if name in kept:
            state[parameter] = kept[name]


def _keep_state(state: dict[Any, Any], task: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Put it away under the task's name: torch saves and loads what is not under a parameter as it is."""
    if parameters:
        state[task] = {name: state.pop(parameter) for name, parameter in parameters.items() if parameter in state}
