"""From a round's folder of replies to one update: a pure function of the folder, one tensor in memory at a time."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tat_core.checkpoint import save_arrays
from tat_core.loss import TaskStats
from tat_core.packet import Packet, metrics_to_stats
from tat_core.sharing import owner_of

log = logging.getLogger("fed_tat.server")


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
        ``seconds``, ``bytes``, ``steps``, ``norm``, and ``scale``: 1, or less where an overlong update is shortened.
    """

    site: str
    path: Path
    stats: dict[str, TaskStats]
    facts: dict[str, Any]

    def task_shares(self) -> dict[str, float]:
        """How much of the site's work went to each task; sums to 1."""
        total = sum(s.count for s in self.stats.values())
        return {task: s.count / total for task, s in self.stats.items()}


class UpdateFile:
    """Reads single float32 tensors of a safetensors file, opened anew each time and never mapped.

    The library maps the whole file, and every page touched then counts as this process's memory for as long as it is open: with
    64 sites that is 64 models. Kept open, a thousand sites would run out of file descriptors. The format is a length, a JSON
    header with offsets, and the bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            length = file.seek(0, os.SEEK_END)
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self._places = {
            sys.intern(key): (8 + size + entry["data_offsets"][0], tuple(entry["shape"])) for key, entry in header.items()
        }
        if length != 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0):
            raise ValueError("the file is shorter or longer than its header says")

    def read(self, key: str) -> np.ndarray:
        """One tensor, float32, in its shape."""
        offset, shape = self._places[key]
        array = np.empty(shape, np.float32)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(offset)
            read = file.readinto(array.reshape(-1).view(np.uint8).data)
        assert read == array.nbytes, "a spooled file is complete before it gets its name"
        return array


def spool(folder: Path, site: str, reply: Packet, facts: Mapping[str, Any], nonce: str) -> Spooled:
    """Write a reply to the round's folder, durably; once this returns, a crash does not lose it.

    Parameters
    ----------
    folder, site, reply, facts
    nonce : str
        Of the round; without it a folder could not be told from that of another run, or of a round that was begun anew.
    """
    path = folder / f"{site}.safetensors"
    metadata = {"metrics": json.dumps(reply.metrics), "facts": json.dumps(dict(facts)), "nonce": nonce}
    save_arrays(path, reply.arrays, metadata)
    return Spooled(site, path, metrics_to_stats(reply.metrics), dict(facts))


def read_spool(folder: Path, nonce: str) -> dict[str, Spooled]:
    """The replies in a round's folder that belong to the round with this nonce, in the order of the sites' names."""
    replies = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            metadata = UpdateFile(path).metadata
            if metadata["nonce"] == nonce:
                stats = metrics_to_stats(json.loads(metadata["metrics"]))
                replies[path.stem] = Spooled(path.stem, path, stats, json.loads(metadata["facts"]))
        except Exception as error:  # whatever a damaged file makes the readers say, the site can be asked again
            log.warning("spool: the reply of %s is damaged (%s); the site is asked again", path.stem, error)
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
    files = {site: UpdateFile(replies[site].path) for site in order}
    for key in keys:
        owner = owner_of(key)[0]
        means: dict[str, np.ndarray] = {}
        for site in order:
            concerned = [task for task in shares[site] if owner in (None, task)]
            if not concerned:
                continue
            update = files[site].read(key)
            for task in concerned:
                part = update * np.float32(replies[site].facts["scale"] * shares[site][task] / total[task])
                means[task] = means[task] + part if task in means else part
        yield key, dict(sorted(means.items()))
