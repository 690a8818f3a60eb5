"""Which parameters all tasks share and which each task has of its own.

The arrays of a federated model are one flat mapping: a shared parameter under its name, a task's own under ``<TASK>:<name>``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from tat_core.groups import group_of


def owner_of(key: str) -> tuple[str | None, str]:
    """The task that a key belongs to (None: all of them) and the parameter's name in the network."""
    task, separator, name = key.partition(":")
    return (task, name) if separator else (None, key)


def give_own(arrays: Mapping[str, np.ndarray], tasks: Collection[str], groups: Collection[str]) -> dict[str, np.ndarray]:
    """Turn a network's arrays into a federated model's: every task gets its own copy of the parameters in `groups`.

    Parameters
    ----------
    arrays : mapping of parameter name to array
    tasks : collection of str
    groups : collection of str
        Of ``backbone``, ``hypernetwork``, ``adapter``; see `tat_core.groups`.
    """
    model: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if group_of(name) in groups:
            model |= {f"{task}:{name}": value.copy() for task in tasks}
        else:
            model[name] = value
    return model


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
