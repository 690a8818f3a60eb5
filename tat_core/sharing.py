"""Which parameters all tasks share and which each task has of its own.

The arrays of a federated model are one flat mapping: a shared parameter under its name, a task's own under ``<TASK>:<name>``.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import numpy as np

from tat_core.groups import TASK_CODE, group_of


def owner_of(key: str) -> tuple[str | None, str]:
    """The task that a key belongs to (None: all of them) and the parameter's name in the network."""
    task, separator, name = key.partition(":")
    return (task, name) if separator else (None, key)


def give_own(
    arrays: Mapping[str, np.ndarray], tasks: Collection[str], task_groups: Collection[str], site_groups: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Turn a network's arrays into a federated model's.

    Parameters
    ----------
    arrays : mapping of parameter name to array
    tasks : collection of str
    task_groups, site_groups : collections of str
        Groups (`tat_core.groups`) of which every task gets a copy of its own, and groups that are left out, since every site has
        its own.
    """
    model: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        group = group_of(name)
        if group in task_groups:
            model |= {f"{task}:{name}": start_of(name, task, value) for task in tasks}
        elif group not in site_groups:
            model[name] = value
    return model


def start_of(name: str, task: str, value: np.ndarray) -> np.ndarray:
    """What a task's own parameter starts as: a copy, but of the task's code a random vector that is the same in every run.

    Tasks whose codes start alike would have to learn to differ; tasks that start apart have kernels of their own at once.
    """
    if name != TASK_CODE:
        return value.copy()
    return np.random.default_rng(zlib.crc32(task.encode())).standard_normal(value.shape).astype(np.float32)


def for_tasks(model: Mapping[str, np.ndarray], tasks: Collection[str]) -> dict[str, np.ndarray]:
    """What a site with these tasks needs: the shared parameters and the tasks' own."""
    return {key: value for key, value in model.items() if owner_of(key)[0] in (None, *tasks)}


def view(model: Mapping[str, np.ndarray], task: str | None) -> dict[str, np.ndarray]:
    """The network's arrays for one task.

    Parameters
    ----------
    model : mapping of key to array
    task : str or None
        None is enough where no task has parameters of its own.

    Raises
    ------
    ValueError
        The model has parameters of tasks' own, but none of this task.
    """
    owners = {owner for key in model if (owner := owner_of(key)[0]) is not None}
    if owners and task not in owners:
        raise ValueError(f"model: expected one of its tasks {', '.join(sorted(owners))}, got {task}; name the task of the images")
    return {owner_of(key)[1]: value for key, value in model.items() if owner_of(key)[0] in (None, task)}
