"""Fit a released model to one hospital or one new task: some parameter groups are trained on its images, the rest stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from tat_core.checkpoint import arrays_of, load_arrays
from tat_core.config import ModelConfig, TrainConfig
from tat_core.data.prepared import PreparedSplit
from tat_core.groups import group_of
from tat_core.model.tat import build_model
from tat_core.sharing import owner_of, view
from tat_core.tasks import TASKS
from tat_core.train import train


def adapt(
    arrays: Mapping[str, np.ndarray],
    model: ModelConfig,
    split: PreparedSplit,
    config: TrainConfig,
    *,
    groups: Collection[str],
    num_steps: int,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Train the task's own copy of some parameter groups, with everything else frozen.

    Parameters
    ----------
    arrays : mapping of key to array
        A released model's: shared parameters and tasks' own (`tat_core.sharing`).
    model : ModelConfig
    split : PreparedSplit
        Training slices of one task, which may be a task that the model does not know yet.
    config : TrainConfig
        Patches, learning rate and loss.
    groups : collection of str
        Of ``backbone``, ``hypernetwork``, ``adapter``.
    num_steps, seed, device, on_step
        As in `tat_core.train.train`.

    Returns
    -------
    dict of key to array
        The model with the trained parameters as this task's own. Other tasks restore as before.
    """
    task = split.task.name
    prepared = with_own(arrays, task, groups)
    network = build_model(model, seed)
    load_arrays(network, arrays_of(network) | view(prepared, task))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(group_of(name) in groups)
    train(
        network,
        {task: split},
        config,
        rng=np.random.default_rng(seed),
        num_steps=num_steps,
        device=device,
        on_step=on_step,
    )
    trained = {f"{task}:{name}": value for name, value in arrays_of(network).items() if group_of(name) in groups}
    return prepared | trained


def with_own(arrays: Mapping[str, np.ndarray], task: str, groups: Collection[str]) -> dict[str, np.ndarray]:
    """The same model with the parameters of `groups` as tasks' own.

    A shared parameter is copied to every task, so that the others restore as before. A task that has no parameters of its own
    yet starts with the mean of the others'.
    """
    owners = sorted({owner for key in arrays if (owner := owner_of(key)[0])}) or list(TASKS)
    result: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        owner, name = owner_of(key)
        if owner is None and group_of(name) in groups:
            result |= {f"{other}:{name}": value.copy() for other in sorted({*owners, task})}
        else:
            result[key] = value
    for name in [owner_of(key)[1] for key in arrays if owner_of(key)[0] == owners[0]]:
        if f"{task}:{name}" not in result:
            others = np.stack([arrays[f"{owner}:{name}"] for owner in owners])
            result[f"{task}:{name}"] = np.asarray(others.mean(0), np.float32)
    return result
