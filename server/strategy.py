"""A run and its rounds, in words; the maths is in `aggregate`, `combine` and `tat_core.balance`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from server import journal
from server.aggregate import Spooled, read_spool, spool, task_means, total_stats
from server.combine import Geometry, aggregation_weights, combine
from server.guard import fault_in
from server.journal import ServerState
from server.scores import Validation, mean_gain_db, pool_scores
from tat_core.balance import BalanceState, balance
from tat_core.checkpoint import arrays_of, model_hash, save_model
from tat_core.config import RunConfig, TrainConfig
from tat_core.model.tat import build_model
from tat_core.packet import Packet
from tat_core.sharing import for_tasks, give_own, owner_of

log = logging.getLogger("fed_tat.server")


@dataclass(frozen=True)
class SiteInfo:
    """What a site said of itself when it was asked."""

    tasks: tuple[str, ...]
    patients: str


class Sites(Protocol):
    """The hospitals, however they are reached."""

    def connect(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites that take part, by name."""

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet]]:
        """Send each named site its instruction ("train" or "evaluate") and yield the replies as they arrive."""


def run(config: RunConfig, sites: Sites, folder: Path) -> ServerState:
    """Carry a run from its first round, or from the last one on disk, to its last.

    Parameters
    ----------
    config : RunConfig
    sites : Sites
    folder : Path
        ``runs/<name>``: everything that the run leaves behind.

    Returns
    -------
    ServerState
        The state after the last round.

    Raises
    ------
    ValueError
        The folder holds another run, no site takes part, or every reply of a round was refused.
    """
    state = begin(config, folder)
    members = sites.connect(config)
    log.info("sites: %s", ", ".join(f"{name} ({'+'.join(info.tasks)})" for name, info in sorted(members.items())))
    while state.round < config.num_rounds:
        state = run_round(state, config, sites, members, folder)
    return state


def begin(config: RunConfig, folder: Path) -> ServerState:
    """The state to go on from: a new model, or the newest state on disk that verifies."""
    if config.resume and (folder / "config.yaml").exists():
        before = journal.read_config(folder)
        if replace(before, resume=True) != replace(config, resume=True):
            raise ValueError(
                f"resume: expected the configuration that {folder.name} was started with, got another; "
                "use the same preset and overrides"
            )
        state = journal.load_state(folder)
        if state is not None:
            journal.rewind_record(folder, state.round)
            log.info("resume: round %d is on disk, going on with round %d", state.round, state.round + 1)
            return state
        journal.rewind_record(folder, 0)
    else:
        journal.start_run(folder, config)
    network = arrays_of(build_model(config.model, config.seed))
    return ServerState(0, give_own(network, config.tasks, config.federation.task_groups), BalanceState())


def run_round(state: ServerState, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo], folder: Path) -> ServerState:
    """One round: collect the sites' updates, fold them into the model, score it, write it down."""
    started_at, started = datetime.now(UTC), time.perf_counter()
    number = state.round + 1
    replies, site_records = collect(state, number, config, sites, members, folder)
    stats = total_stats(replies)
    balance_state, task_weight = balance(state.balance, stats, config.balance)
    aggregation_weight = aggregation_weights(list(stats))
    model, geometry = step(state.model, replies, aggregation_weight, config.federation.server_lr)
    average = move_average(state.released, model, config.train, number) if config.train.ema_decay else {}
    state = replace(state, round=number, model=model, average=average, balance=balance_state)

    scored = number % config.federation.evaluate_every == 0 or number == config.num_rounds
    validation = evaluate(state, config, sites, members) if scored else {}
    gain_db = mean_gain_db(validation)
    if gain_db is not None and gain_db > state.best_gain_db:
        state = replace(state, best_round=number, best_gain_db=gain_db)
    if state.best_round == number or state.best_round == 0:
        facts = {"run": config.name, "round": number, "seed": config.seed, "gain_db": gain_db}
        save_model(folder / "model.safetensors", state.released, config.model, facts)

    record = {
        "round": number,
        "num_rounds": config.num_rounds,
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
        "model_sha256": model_hash(state.model),
        "update_norm": geometry.step_norm,
        "task_update_norms": geometry.norms(),
        "cosines": geometry.cosines(),
        "sites": site_records,
        "mean_gain_db": gain_db,
        "best_round": state.best_round,
        "tasks": {
            task: {
                "loss": s.mean_loss,
                "input_loss": s.mean_input,
                "task_weight": task_weight[task],
                "aggregation_weight": aggregation_weight[task],
                **({"validation": validation[task].means()} if task in validation else {}),
            }
            for task, s in stats.items()
        },
    }
    journal.append_record(folder, record)
    journal.save_state(folder, state)
    journal.clear_spool(folder, number)
    log.info("%s", describe_round(record))
    return state


def collect(
    state: ServerState, number: int, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo], folder: Path
) -> tuple[dict[str, Spooled], dict[str, Any]]:
    """Ask the sites that have not replied yet, guard each reply as it arrives, and keep the good ones on disk.

    Replies that a killed coordinator had already spooled for this round and this model are kept.

    Raises
    ------
    ValueError
        No reply may be aggregated.
    """
    instructions = instruct(state.model, number, members)
    spooled_in = journal.spool_folder(folder, number)
    replies = read_spool(spooled_in, {name: str(instruction.config["base"]) for name, instruction in instructions.items()})
    records: dict[str, Any] = {name: {"tasks": list(info.tasks), "status": "NO_REPLY"} for name, info in sorted(members.items())}
    for name, kept in replies.items():
        records[name] = {"tasks": list(kept.stats), "status": "ok", **kept.facts}
    missing = {name: instruction for name, instruction in instructions.items() if name not in replies}
    started = time.perf_counter()
    for name, reply in sites.ask("train", missing, config.federation.round_timeout_s):
        fault = fault_in(
            reply,
            instructions[name],
            tasks=members[name].tasks,
            max_samples=config.train.local_steps * config.train.batch_size,
        )
        if fault is None:
            facts = {"seconds": round(time.perf_counter() - started, 3), "bytes": sum(v.nbytes for v in reply.arrays.values())}
            replies[name] = spool(spooled_in, name, reply, facts)
            records[name] |= {"status": "ok", **facts}
        else:
            log.warning("round %d: the reply of %s is left out: %s", number, name, fault)
            records[name] |= {"status": fault}
    if not replies:
        raise ValueError(
            f"round {number}: expected at least one site's update, got none ({_statuses(records)}); look into the sites' logs"
        )
    return replies, records


def instruct(model: Mapping[str, np.ndarray], number: int, members: Mapping[str, SiteInfo]) -> dict[str, Packet]:
    """What each site is sent: the shared parameters, its tasks' own, and their hash. Sites of the same tasks share a packet."""
    packets: dict[tuple[str, ...], Packet] = {}
    for tasks in sorted({info.tasks for info in members.values()}):
        arrays = for_tasks(model, tasks)
        packets[tasks] = Packet(arrays, {}, {"round": number, "base": model_hash(arrays)})
    return {name: packets[info.tasks] for name, info in sorted(members.items())}


def step(
    model: Mapping[str, np.ndarray], replies: Mapping[str, Spooled], weights: Mapping[str, float], server_lr: float
) -> tuple[dict[str, np.ndarray], Geometry]:
    """The new model: a pure function of the old one and the round's folder, parameter by parameter."""
    geometry = Geometry()
    stepped: dict[str, np.ndarray] = {}
    for key, means in task_means(replies, list(model)):
        owner = owner_of(key)[0]
        if owner is None:
            update = combine(means, weights)
            geometry.add(means, update)
            stepped[key] = model[key] + np.float32(server_lr) * update
        else:
            # What is a task's own follows its sites alone, and stays as it is when none of them reported.
            stepped[key] = model[key] + means[owner] if owner in means else model[key]
    return stepped, geometry


def move_average(
    average: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray], config: TrainConfig, number: int
) -> dict[str, np.ndarray]:
    """The exponential moving average after a round, with the decay per step raised to the round's steps.

    Early on the decay is lower, so that the first models are forgotten.
    """
    decay = min(config.ema_decay**config.local_steps, number / (number + 9))
    return {name: np.float32(decay) * average[name] + np.float32(1 - decay) * value for name, value in model.items()}


def evaluate(state: ServerState, config: RunConfig, sites: Sites, members: Mapping[str, SiteInfo]) -> dict[str, Validation]:
    """Pooled scores of the model on the sites' validation patients, by task; a site that fails is left out."""
    metrics = {}
    instructions = instruct(state.released, state.round, members)
    for name, reply in sites.ask("evaluate", instructions, config.federation.round_timeout_s):
        if reply.error is None:
            metrics[name] = reply.metrics
        else:
            log.warning("round %d: the scores of %s are left out: %s", state.round, name, reply.error)
    return pool_scores(metrics, config.tasks)


def describe_round(record: Mapping[str, Any]) -> str:
    """One line on a round, for the log."""
    scores = [
        f"{task} {v['restored']['psnr']:.2f} dB ({v['restored']['psnr'] - v['input']['psnr']:+.2f})"
        for task, facts in record["tasks"].items()
        if (v := facts.get("validation"))
    ]
    return f"round {record['round']}/{record['num_rounds']}: {', '.join(scores) or 'not scored'}; {record['seconds']:.1f} s"


def _statuses(records: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {facts['status']}" for name, facts in records.items())
