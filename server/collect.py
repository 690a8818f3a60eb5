"""Collecting a round's replies: ask, guard, spool, know when to stop waiting, and close."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.aggregate import Spooled, read_spool, spool
from server.guard import answers, examine, length
from server.history import SiteHistory, deadline_s, steps_for, usual_norm
from server.journal import ServerState, spool_folder
from server.sites import SiteInfo, Sites
from tat_core.blobs import packed_bytes
from tat_core.checkpoint import model_hash
from tat_core.config import RunConfig
from tat_core.packet import Packet
from tat_core.sharing import for_tasks

log = logging.getLogger("fed_tat.server")


class NobodyRepliedError(ValueError):
    """Not one of the sites asked sent anything, good or bad: the fault is in between, and asking again may help."""


@dataclass(frozen=True)
class Collected:
    """A closed round.

    Attributes
    ----------
    replies : dict of site name to Spooled
        What may be aggregated.
    sites : dict of site name to dict
        For the record: tasks, status ("ok", "late", a code, "LEFT_OUT" or "NO_REPLY"), seconds, bytes, steps, norm, scale; and
        "late_reply" where one came and was not used.
    history : dict of site name to SiteHistory
    awaited : dict of site name to dict
        What the sites without a reply were sent, arrays apart.
    """

    replies: dict[str, Spooled]
    sites: dict[str, dict[str, Any]]
    history: dict[str, SiteHistory]
    awaited: dict[str, dict[str, Any]]


@dataclass
class OpenRound:
    """A round, and what has come in so far.

    Attributes
    ----------
    state : ServerState
        After the round before.
    config : RunConfig
    folder : Path
        Where replies are spooled, late ones in a folder of their own below.
    asked : dict of site name to SiteInfo
    instructions : dict of site name to Packet
        What they are sent.
    usual : dict of tuple of task names to float or None
        The usual length of an update of sites with these tasks.
    replies, late : dict of site name to Spooled
        To this round, and to the one before.
    faults : dict of site name to str
        Why a site's reply is left out.
    strikes, dropped : set of site names
        Whose reply the guard refused; whose reply came too late to be of use.
    """

    state: ServerState
    config: RunConfig
    folder: Path
    asked: dict[str, SiteInfo]
    instructions: dict[str, Packet]
    usual: dict[tuple[str, ...], float | None]
    replies: dict[str, Spooled]
    late: dict[str, Spooled]
    faults: dict[str, str] = field(default_factory=dict)
    strikes: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    @property
    def number(self) -> int:
        """Of the round; the first is 1."""
        return self.state.round + 1


def collect(state: ServerState, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo], folder: Path) -> Collected:
    """Ask the sites that have not replied yet, guard each reply as it arrives, and keep the good ones on disk.

    Replies that a killed coordinator had already spooled for this round are kept. A reply to the round before that arrives now is
    taken, at ``staleness_weight``, if its site has no newer one when the round closes.

    Raises
    ------
    NobodyRepliedError
        No site that was asked sent anything.
    ValueError
        No reply may be aggregated.
    """
    opened = begin_round(state, config, members, folder)
    listen(opened, sites)
    return close(opened, members)


def begin_round(state: ServerState, config: RunConfig, members: Mapping[str, SiteInfo], folder: Path) -> OpenRound:
    """The round with the replies that are on disk already; sites with too many strikes are not asked."""
    asked = {name: info for name, info in members.items() if state.strikes_of(name) < config.federation.max_strikes}
    about = {"run": state.run, "round": state.round + 1, "nonce": state.nonce}
    tasks_of = {name: info.tasks for name, info in members.items()}
    place = spool_folder(folder, state.round + 1)
    (place / "late").mkdir(exist_ok=True)
    return OpenRound(
        state,
        config,
        place,
        asked,
        instructions=instruct(state.model, about, asked, _steps(state, config, list(asked))),
        usual={tasks: usual_norm(tasks, state.history, tasks_of) for tasks in sorted(set(tasks_of.values()))},
        replies=read_spool(place, state.nonce),
        late=read_spool(place / "late", state.nonce),
    )


def instruct(
    arrays: Mapping[str, Any], about: Mapping[str, Any], members: Mapping[str, SiteInfo], steps: Mapping[str, int]
) -> dict[str, Packet]:
    """What each site is sent: the shared parameters, its tasks' own, their hash, and its local steps.

    Sites of the same tasks share the arrays, and those of the same steps the packet.

    Parameters
    ----------
    arrays : mapping of key to float32 array
    about : mapping
        ``run``, ``round`` and ``nonce``.
    members : mapping of site name to SiteInfo
    steps : mapping of site name to int
    """
    chosen = {tasks: for_tasks(arrays, tasks) for tasks in sorted({info.tasks for info in members.values()})}
    with ThreadPoolExecutor() as pool:  # nothing else is done meanwhile, and hashing leaves the interpreter to others
        bases = dict(zip(chosen, pool.map(model_hash, chosen.values()), strict=True))
    packets: dict[tuple[tuple[str, ...], int], Packet] = {}
    instructions = {}
    for name, info in sorted(members.items()):
        key = info.tasks, steps.get(name, 0)
        if key not in packets:
            packets[key] = Packet(chosen[info.tasks], {}, {**about, "base": bases[info.tasks], "steps": key[1]})
        instructions[name] = packets[key]
    return instructions


def listen(opened: OpenRound, sites: Sites) -> None:
    """Ask those who have not replied, and take what comes until all have, or the deadline is over with a quorum of each task."""
    missing = {name: packet for name, packet in opened.instructions.items() if name not in opened.replies}
    started = time.perf_counter()
    for news in sites.ask("train", missing, opened.config.federation.round_timeout_s) if missing else ():
        seconds = round(time.perf_counter() - started, 3)
        if news is not None:
            take(opened, *news, seconds)
        if seconds > _deadline_s(opened, list(missing)) and _has_quorum(opened):
            break


def take(opened: OpenRound, name: str, reply: Packet, seconds: float) -> None:
    """Guard one reply and spool it; the first good one of a site counts."""
    state, instruction = opened.state, opened.instructions[name]
    before = replace(instruction, config=state.awaited.get(name, instruction.config))  # of the same names and shapes
    is_late = name in state.awaited and answers(reply, before)
    if name in (opened.late if is_late else opened.replies):
        log.warning("round %d: another reply of %s is dropped", opened.number, name)
        return
    fault, facts = _judge(opened, name, reply, before if is_late else instruction)
    facts["seconds"] = seconds
    if fault is not None:
        log.warning("round %d: the reply of %s is left out: %s", opened.number, name, fault)
        opened.faults[name] = fault
        if reply.error is None:  # what a site says of itself is an ordinary event, an unfit update is not
            opened.strikes.add(name)
    elif not is_late:
        opened.replies[name] = spool(opened.folder, name, reply, facts, state.nonce)
    elif opened.config.federation.staleness_weight:
        facts["scale"] *= opened.config.federation.staleness_weight
        opened.late[name] = spool(opened.folder / "late", name, reply, facts, state.nonce)
    else:
        opened.dropped.add(name)


def close(opened: OpenRound, members: Mapping[str, SiteInfo]) -> Collected:
    """What counts of what has arrived, what the record says of each site, and what is remembered of it.

    Raises
    ------
    NobodyRepliedError, ValueError
        See `collect`.
    """
    replies, history = dict(opened.replies), dict(opened.state.history)
    records: dict[str, dict[str, Any]] = {
        name: {"tasks": list(info.tasks), "status": opened.faults.get(name, "NO_REPLY" if name in opened.asked else "LEFT_OUT")}
        for name, info in sorted(members.items())
    }
    for name in sorted(opened.strikes):
        history[name] = history.get(name, SiteHistory()).refused()
    for name, kept in sorted(opened.replies.items()):
        facts = kept.facts
        records[name] = {"tasks": list(kept.stats), "status": "ok", **facts}
        history[name] = history.get(name, SiteHistory()).accepted(
            facts["norm"] * facts["scale"], facts["seconds"], facts["steps"]
        )
    for name, kept in sorted(opened.late.items()):
        if name in replies:
            records[name]["late_reply"] = "superseded"
        else:
            replies[name] = kept
            records[name] = {"tasks": list(kept.stats), "status": "late", **kept.facts}
    for name in sorted(opened.dropped):
        records[name]["late_reply"] = "dropped"
    if not replies:
        statuses = ", ".join(f"{name}: {facts['status']}" for name, facts in records.items())
        kind = NobodyRepliedError if opened.asked and not opened.faults else ValueError
        raise kind(f"round {opened.number}: expected at least one site's update, got none ({statuses}); see the sites' logs")
    silent = [name for name in opened.asked if records[name]["status"] in ("NO_REPLY", "late")]
    history |= {name: history.get(name, SiteHistory()).missed() for name in silent}
    return Collected(replies, records, history, {name: dict(opened.instructions[name].config) for name in silent})


def _judge(opened: OpenRound, name: str, reply: Packet, instruction: Packet) -> tuple[str | None, dict[str, Any]]:
    """The guard's verdict, and what the record keeps of the reply.

    An update of fewer steps is lengthened in proportion, then shortened to what is usual.
    """
    config, tasks, steps = opened.config, opened.asked[name].tasks, int(instruction.config["steps"])
    usual = opened.usual[tasks]
    correction = config.train.local_steps / steps
    fault, norm = examine(
        reply,
        instruction,
        tasks=tasks,
        max_samples=config.train.local_steps * config.train.batch_size,
        longest=config.federation.refuse_factor * usual if usual else length(instruction.arrays),
    )
    full = norm * correction
    clip = min(1.0, config.federation.clip_factor * usual / full) if usual and full else 1.0
    return fault, {"bytes": packed_bytes(reply.arrays), "steps": steps, "norm": norm, "scale": correction * clip}


def _deadline_s(opened: OpenRound, members: list[str]) -> float:
    federation = opened.config.federation
    awaited = [name for name in members if name not in opened.replies and name not in opened.faults]
    times = federation.deadline_factor, federation.deadline_floor_s, federation.round_timeout_s
    return deadline_s(opened.state.history, members, awaited, *times)


def _steps(state: ServerState, config: RunConfig, members: list[str]) -> dict[str, int]:
    local_steps = config.train.local_steps
    if not config.train.step_budget:
        return dict.fromkeys(members, local_steps)
    return {name: steps_for(name, members, state.history, local_steps) for name in members}


def _has_quorum(opened: OpenRound) -> bool:
    """Whether every task has its number of replies, or all that it can still have: a site that failed will send no other."""
    able = [task for name, info in opened.asked.items() if name not in opened.faults for task in info.tasks]
    there = [task for reply in opened.replies.values() for task in reply.stats]
    quorum = opened.config.federation.quorum_per_task
    return all(there.count(task) >= min(quorum, able.count(task)) for task in set(able))
