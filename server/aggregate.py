"""From a round's folder of replies to one update: a pure function of the folder, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tat_core.checkpoint import replacing
from tat_core.loss import TaskStats
from tat_core.packet import Packet, metrics_to_stats
from tat_core.sharing import owner_of


@dataclass(frozen=True)
class Spooled:
    """A reply on disk.

    Attributes
    ----------
    site : str
    path : Path
        Its update, safetensors.
    stats : dict of task name to TaskStats
    facts : dict
        ``seconds``, ``bytes``, ``norm``, and ``scale``: 1, or less where an overlong update is shortened.
    """

    site: str
    path: Path
    stats: dict[str, TaskStats]
    facts: dict[str, Any]

    def task_shares(self) -> dict[str, float]:
        """How much of the site's work went to each task; sums to 1."""
        total = sum(s.count for s in self.stats.values())
        return {task: s.count / total for task, s in self.stats.items()}


def spool(folder: Path, site: str, reply: Packet, facts: Mapping[str, Any], model: str) -> Spooled:
    """Write a reply to the round's folder, durably; once this returns, a crash does not lose it.

    Parameters
    ----------
    folder, site, reply, facts
    model : str
        Hash of the model that the round started from; without it a folder could not be told from that of another run.
    """
    path = folder / f"{site}.safetensors"
    metadata = {"metrics": json.dumps(reply.metrics), "facts": json.dumps(dict(facts)), "model": model}
    arrays = {name: np.ascontiguousarray(value) for name, value in reply.arrays.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)
    return Spooled(site, path, metrics_to_stats(reply.metrics), dict(facts))


def read_spool(folder: Path, model: str) -> dict[str, Spooled]:
    """The replies in a round's folder that belong to the model with this hash, in the order of the sites' names."""
    replies = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        if metadata["model"] == model:
            stats = metrics_to_stats(json.loads(metadata["metrics"]))
            replies[path.stem] = Spooled(path.stem, path, stats, json.loads(metadata["facts"]))
    return replies


def total_stats(replies: Mapping[str, Spooled]) -> dict[str, TaskStats]:
    """Statistics of all replies, by task."""
    total: dict[str, TaskStats] = {}
    for site in sorted(replies):
        for task, stats in replies[site].stats.items():
            total[task] = total.get(task, TaskStats()) + stats
    return dict(sorted(total.items()))


def task_means(replies: Mapping[str, Spooled], keys: list[str]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """For each parameter in order, the mean update of each task.

    Sites of a task count alike; a site with several tasks counts toward each by that task's share of its samples.

    Parameters
    ----------
    replies : mapping of site name to Spooled
    keys : list of str
        Parameters, in the model's order; a task's own (``<TASK>:<name>``) are averaged over that task's sites alone.

    Yields
    ------
    key : str
    means : dict of task name to float32 array
        Empty for a task's own parameter if nobody reported the task.
    """
    order = sorted(replies)
    shares = {site: replies[site].task_shares() for site in order}
    tasks = sorted({task for share in shares.values() for task in share})
    total = {task: sum(shares[site].get(task, 0.0) for site in order) for task in tasks}
    with ExitStack() as stack:
        files = {site: stack.enter_context(safe_open(replies[site].path, framework="numpy")) for site in order}
        for key in keys:
            owner = owner_of(key)[0]
            means: dict[str, np.ndarray] = {}
            for site in order:
                concerned = [task for task in shares[site] if owner in (None, task)]
                if not concerned:
                    continue
                update = files[site].get_tensor(key)
                for task in concerned:
                    part = update * np.float32(replies[site].facts["scale"] * shares[site][task] / total[task])
                    means[task] = means[task] + part if task in means else part
            yield key, dict(sorted(means.items()))
