"""Collecting a round's replies: ask, guard, spool, and know when to stop waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.aggregate import Spooled, read_spool, spool
from server.guard import examine, length
from server.history import SiteHistory, deadline_s, usual_norm
from server.journal import ServerState, spool_folder
from server.sites import SiteInfo, Sites
from tat_core.checkpoint import model_hash
from tat_core.config import RunConfig
from tat_core.packet import Packet
from tat_core.sharing import for_tasks

log = logging.getLogger("fed_tat.server")


@dataclass(frozen=True)
class Collected:
    """A closed round.

    Attributes
    ----------
    replies : dict of site name to Spooled
        What may be aggregated.
    sites : dict of site name to dict
        For the round's record: tasks, status ("ok", a code, "LEFT_OUT" or "NO_REPLY"), seconds, bytes, norm, scale.
    history : dict of site name to SiteHistory
    """

    replies: dict[str, Spooled]
    sites: dict[str, dict[str, Any]]
    history: dict[str, SiteHistory]


def instruct(arrays: Mapping[str, Any], run: str, number: int, members: Mapping[str, SiteInfo]) -> dict[str, Packet]:
    """What each site is sent: the shared parameters, its tasks' own, and their hash. Sites of the same tasks share a packet."""
    packets: dict[tuple[str, ...], Packet] = {}
    for tasks in sorted({info.tasks for info in members.values()}):
        chosen = for_tasks(arrays, tasks)
        packets[tasks] = Packet(chosen, {}, {"run": run, "round": number, "base": model_hash(chosen)})
    return {name: packets[info.tasks] for name, info in sorted(members.items())}


def collect(state: ServerState, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo], folder: Path) -> Collected:
    """Ask the sites that have not replied yet, guard each reply as it arrives, and keep the good ones on disk.

    Replies that a killed coordinator had already spooled for this round and this model are kept.

    Raises
    ------
    ValueError
        No reply may be aggregated.
    """
    number, federation = state.round + 1, config.federation
    asked = {name: info for name, info in members.items() if state.strikes_of(name) < federation.max_strikes}
    instructions = instruct(state.model, state.run, number, asked)
    place = spool_folder(folder, number)
    model = model_hash(state.model)
    replies = read_spool(place, model)
    history = dict(state.history)
    records: dict[str, dict[str, Any]] = {
        name: {"tasks": list(info.tasks), "status": "NO_REPLY" if name in asked else "LEFT_OUT"}
        for name, info in sorted(members.items())
    }
    for name, kept in replies.items():
        records[name] = {"tasks": list(kept.stats), "status": "ok", **kept.facts}
    tasks_of = {name: info.tasks for name, info in members.items()}
    started = time.perf_counter()
    missing = {name: packet for name, packet in instructions.items() if name not in replies}
    deadline = deadline_s(
        state.history, sorted(missing), federation.deadline_factor, federation.deadline_floor_s, federation.round_timeout_s
    )
    for news in sites.ask("train", missing, federation.round_timeout_s) if missing else ():
        seconds = round(time.perf_counter() - started, 3)
        if news is not None:
            name, reply = news
            usual = usual_norm(name, tasks_of[name], state.history, tasks_of)
            longest = federation.refuse_factor * usual if usual else length(instructions[name].arrays)
            fault, norm = examine(
                reply,
                instructions[name],
                tasks=tasks_of[name],
                max_samples=config.train.local_steps * config.train.batch_size,
                longest=longest,
            )
            if fault is None:
                facts = _facts(reply, seconds, norm, federation.clip_factor * usual if usual else norm)
                replies[name] = spool(place, name, reply, facts, model)
                records[name] |= {"status": "ok", **facts}
            else:
                log.warning("round %d: the reply of %s is left out: %s", number, name, fault)
                records[name] |= {"status": fault}
                if reply.error is None:  # what a site says of itself is an ordinary event, an unfit update is not
                    history[name] = history.get(name, SiteHistory()).refused()
        if seconds > deadline and _has_quorum(replies, tasks_of, federation.quorum_per_task):
            break
    if not replies:
        statuses = ", ".join(f"{name}: {facts['status']}" for name, facts in records.items())
        raise ValueError(f"round {number}: expected at least one site's update, got none ({statuses}); look into the sites' logs")
    for name in sorted(replies):
        facts = replies[name].facts
        history[name] = history.get(name, SiteHistory()).accepted(facts["norm"] * facts["scale"], facts["seconds"])
    return Collected(replies, records, history)


def _facts(reply: Packet, seconds: float, norm: float, allowed: float) -> dict[str, float]:
    size = sum(value.nbytes for value in reply.arrays.values())
    return {"seconds": seconds, "bytes": size, "norm": norm, "scale": min(1.0, allowed / norm) if norm else 1.0}


def _has_quorum(replies: Mapping[str, Spooled], tasks_of: Mapping[str, tuple[str, ...]], quorum: int) -> bool:
    """Whether every task has its number of replies, or all that it can have."""
    able = [task for tasks in tasks_of.values() for task in tasks]
    there = [task for reply in replies.values() for task in reply.stats]
    return all(there.count(task) >= min(quorum, able.count(task)) for task in set(able))
