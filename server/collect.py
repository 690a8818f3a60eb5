"""Collecting a round's replies: ask, guard, spool, and know when to stop waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.aggregate import Spooled, read_spool, spool
from server.guard import examine, length
from server.history import SiteHistory, deadline_s, steps_for, usual_norm
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
        For the record: tasks, status ("ok", "late", a code, "LEFT_OUT" or "NO_REPLY"), seconds, bytes, steps, norm, scale.
    history : dict of site name to SiteHistory
    awaited : dict of site name to str
        Base version that the sites without a reply were sent.
    """

    replies: dict[str, Spooled]
    sites: dict[str, dict[str, Any]]
    history: dict[str, SiteHistory]
    awaited: dict[str, str]


def instruct(
    arrays: Mapping[str, Any], run: str, number: int, members: Mapping[str, SiteInfo], steps: Mapping[str, int]
) -> dict[str, Packet]:
    """What each site is sent: the shared parameters, its tasks' own, their hash, and its local steps.

    Sites of the same tasks share the arrays, and those of the same steps the packet.
    """
    chosen = {tasks: for_tasks(arrays, tasks) for tasks in sorted({info.tasks for info in members.values()})}
    bases = {tasks: model_hash(some) for tasks, some in chosen.items()}
    packets: dict[tuple[tuple[str, ...], int], Packet] = {}
    instructions = {}
    for name, info in sorted(members.items()):
        key = info.tasks, steps.get(name, 0)
        if key not in packets:
            config: dict[str, Any] = {"run": run, "round": number, "base": bases[info.tasks], "steps": key[1]}
            packets[key] = Packet(chosen[info.tasks], {}, config)
        instructions[name] = packets[key]
    return instructions


def collect(state: ServerState, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo], folder: Path) -> Collected:
    """Ask the sites that have not replied yet, guard each reply as it arrives, and keep the good ones on disk.

    Replies that a killed coordinator had already spooled for this round and this model are kept. A reply to the round before that
    arrives now is taken, at ``staleness_weight``, if its site has no newer one when the round closes.

    Raises
    ------
    ValueError
        No reply may be aggregated.
    """
    number, federation = state.round + 1, config.federation
    asked = {name: info for name, info in members.items() if state.strikes_of(name) < federation.max_strikes}
    instructions = instruct(state.model, state.run, number, asked, _steps(state, config, list(asked)))
    place, model = spool_folder(folder, number), model_hash(state.model)
    (place / "late").mkdir(exist_ok=True)
    replies, late = read_spool(place, model), read_spool(place / "late", model)
    history = dict(state.history)
    records: dict[str, dict[str, Any]] = {
        name: {"tasks": list(info.tasks), "status": "NO_REPLY" if name in asked else "LEFT_OUT"}
        for name, info in sorted(members.items())
    }
    tasks_of = {name: info.tasks for name, info in members.items()}
    usual = {tasks: usual_norm(tasks, state.history, tasks_of) for tasks in sorted(set(tasks_of.values()))}
    missing = {name: packet for name, packet in instructions.items() if name not in replies}
    deadline = deadline_s(
        state.history, sorted(missing), federation.deadline_factor, federation.deadline_floor_s, federation.round_timeout_s
    )
    started = time.perf_counter()
    for news in sites.ask("train", missing, federation.round_timeout_s) if missing else ():
        seconds = round(time.perf_counter() - started, 3)
        if news is not None:
            name, reply = news
            is_late = reply.error is None and reply.config.get("round") == state.round and name in state.awaited
            instruction = _of_last_round(name, instructions[name], state) if is_late else instructions[name]
            fault, facts = _judge(reply, instruction, tasks_of[name], usual[tasks_of[name]], config)
            facts |= {"seconds": seconds}
            if fault is not None:
                log.warning("round %d: the reply of %s is left out: %s", number, name, fault)
                records[name] |= {"status": fault}
                if reply.error is None:  # what a site says of itself is an ordinary event, an unfit update is not
                    history[name] = history.get(name, SiteHistory()).refused()
            elif not is_late:
                replies[name] = spool(place, name, reply, facts, model)
            elif federation.staleness_weight:
                facts["scale"] *= federation.staleness_weight
                late[name] = spool(place / "late", name, reply, facts, model)
        if seconds > deadline and _has_quorum(replies, tasks_of, federation.quorum_per_task):
            break
    for name, kept in sorted(replies.items()):
        records[name] = {"tasks": list(kept.stats), "status": "ok", **kept.facts}
        facts = kept.facts
        history[name] = history.get(name, SiteHistory()).accepted(
            facts["norm"] * facts["scale"], facts["seconds"], facts["steps"]
        )
    for name, kept in sorted(late.items()):
        if name not in replies:
            replies[name] = kept
            records[name] = {"tasks": list(kept.stats), "status": "late", **kept.facts}
    if not replies:
        statuses = ", ".join(f"{name}: {facts['status']}" for name, facts in records.items())
        raise ValueError(f"round {number}: expected at least one site's update, got none ({statuses}); look into the sites' logs")
    silent = [name for name in instructions if records[name]["status"] in ("NO_REPLY", "late")]
    return Collected(replies, records, history, {name: str(instructions[name].config["base"]) for name in silent})


def _steps(state: ServerState, config: RunConfig, members: list[str]) -> dict[str, int]:
    local_steps = config.train.local_steps
    if not config.train.step_budget:
        return dict.fromkeys(members, local_steps)
    return {name: steps_for(name, members, state.history, local_steps) for name in members}


def _of_last_round(name: str, instruction: Packet, state: ServerState) -> Packet:
    """The instruction that a late reply answers: of the same arrays' names and shapes, but of the round before."""
    return replace(instruction, config={**instruction.config, "round": state.round, "base": state.awaited[name]})


def _judge(
    reply: Packet, instruction: Packet, tasks: tuple[str, ...], usual: float | None, config: RunConfig
) -> tuple[str | None, dict[str, Any]]:
    """The guard's verdict, and what the record keeps of the reply.

    An update of fewer steps is lengthened in proportion, then shortened to what is usual.
    """
    steps = int(instruction.config["steps"])
    correction = config.train.local_steps / steps
    longest = config.federation.refuse_factor * usual if usual else length(instruction.arrays)
    fault, norm = examine(
        reply,
        instruction,
        tasks=tasks,
        max_samples=config.train.local_steps * config.train.batch_size,
        longest=longest,
    )
    full = norm * correction
    clip = min(1.0, config.federation.clip_factor * usual / full) if usual and full else 1.0
    size = sum(value.nbytes for value in reply.arrays.values())
    return fault, {"bytes": size, "steps": steps, "norm": norm, "scale": correction * clip}


def _has_quorum(replies: Mapping[str, Spooled], tasks_of: Mapping[str, tuple[str, ...]], quorum: int) -> bool:
    """Whether every task has its number of replies, or all that it can have."""
    able = [task for tasks in tasks_of.values() for task in tasks]
    there = [task for reply in replies.values() for task in reply.stats]
    return all(there.count(task) >= min(quorum, able.count(task)) for task in set(able))
