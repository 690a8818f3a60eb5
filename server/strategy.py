"""A run and its rounds, in words; the maths is in `aggregate`, `combine`, `optimise` and `tat_core.balance`."""

from __future__ import annotations

import logging
import math
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from server import journal
from server.aggregate import Spooled, task_means, total_stats
from server.collect import NobodyRepliedError, collect, instruct
from server.combine import Gram, combine, conflict_averse
from server.guard import examine_scores
from server.harm import COMPARISON, wanted_models, write_comparison
from server.journal import ServerState
from server.optimise import Moments, advance
from server.scores import gain_by_site, mean_gain_db, pool_scores
from server.sites import SiteInfo, Sites
from tat_core.balance import BalanceState, balance, step_shares
from tat_core.checkpoint import arrays_of, model_hash, read_model, save_model
from tat_core.config import FederationConfig, RunConfig, TrainConfig
from tat_core.groups import GROUPS, group_of
from tat_core.model.tat import build_model
from tat_core.sharing import give_own, owner_of

log = logging.getLogger("fed_tat.server")

_MAY_CHANGE = (
    *("num_sites", "wait_timeout_s", "round_timeout_s", "rejoin_timeout_s", "patience_s"),
    *("deadline_factor", "deadline_floor_s", "quorum_per_task"),
)


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
        The folder holds another run, no site takes part, every reply of a round was refused, or nobody could be reached
        for longer than ``federation.patience_s``.
    """
    state = begin(config, folder)
    before: dict[str, SiteInfo] = {}
    heard = time.monotonic()
    while state.round < config.num_rounds:
        members = sites.members(config)
        if members != before:
            log.info("sites: %s", ", ".join(f"{name} ({'+'.join(info.tasks)})" for name, info in sorted(members.items())))
        came = {name: info for name, info in members.items() if before.get(name) != info}
        state = journal.readmit(folder, state)
        try:
            state = run_round(state, config, sites, members, came, folder)
        except NobodyRepliedError as silence:
            if time.monotonic() - heard >= config.federation.patience_s:
                raise
            log.warning("%s; asking again", silence)
        else:
            before, heard = members, time.monotonic()
    models = wanted_models(config.federation)
    if len(models) > 1 and not (folder / COMPARISON).exists():
        released, members = read_model(folder / "model.safetensors").arrays, sites.members(config)
        scores = {name: ask_scores(kind, released, state, config, sites, members) for name, kind in models.items()}
        write_comparison(folder, {name: gain_by_site(found, config.tasks) for name, found in scores.items()})
    journal.finish(folder, state)
    return state


def begin(config: RunConfig, folder: Path) -> ServerState:
    """The state to go on from: a new model, or the newest state on disk that verifies."""
    if config.resume and (folder / "config.yaml").exists():
        if _bits(journal.read_config(folder)) != _bits(config):
            raise ValueError(
                f"resume: expected the configuration that {folder.name} was started with, got another; "
                "use the same preset and overrides (only names, folders, num_sites and waiting times may change)"
            )
        (folder / journal.FINISHED).unlink(missing_ok=True)  # if the last states are damaged, it takes rounds anew
        journal.remove_leftovers(folder)
        state = journal.load_state(folder)
        journal.rewind_record(folder, state.round if state else 0)
        if state is not None:
            log.info("resume: round %d is on disk, going on with round %d", state.round, state.round + 1)
            release(folder, config, state)
            return state
    else:
        journal.start_run(folder, config)
    network, federation = arrays_of(build_model(config.model, config.seed)), config.federation
    model = give_own(network, config.tasks, federation.task_groups, federation.site_groups)
    state = ServerState(uuid.uuid4().hex, 0, model, BalanceState())
    journal.save_state(folder, state)  # sites keep state by the run's identity: a resumed run must have the same
    return state


def _bits(config: RunConfig) -> RunConfig:
    """The configuration without what an operator may change when a run goes on: where it lies and how long it waits."""
    federation = replace(config.federation, **{key: getattr(FederationConfig, key) for key in _MAY_CHANGE})
    return replace(config, name="run", output_dir="runs", resume=True, federation=federation)


def run_round(
    state: ServerState,
    config: RunConfig,
    sites: Sites,
    members: Mapping[str, SiteInfo],
    came: Mapping[str, SiteInfo],
    folder: Path,
) -> ServerState:
    """One round: collect the sites' updates, fold them into the model, score it, write it down.

    Of the sites that `came` since the round before, the record keeps what they say of themselves.
    """
    started_at, started = datetime.now(UTC), time.perf_counter()
    number = state.round + 1
    collected = collect(state, config, sites, members, folder)
    stats = total_stats(collected.replies)
    balance_state, task_weight = balance(state.balance, stats, config.balance)
    aggregation_weight = step_shares(balance_state, task_weight, stats, config.balance)
    model, moments, grams, own = step(state, collected.replies, aggregation_weight, config.federation)
    shared = sum(grams.values(), Gram(aggregation_weight))
    average = move_average(state.released, model, config.train, number) if config.train.ema_decay else {}
    state = replace(
        state,
        round=number,
        model=model,
        average=average,
        moments=moments,
        balance=balance_state,
        history=collected.history,
        awaited=collected.awaited,
        nonce=secrets.token_hex(16),
    )

    scored = number % config.federation.evaluate_every == 0 or number == config.num_rounds
    site_metrics = ask_scores("evaluate", state.released, state, config, sites, members) if scored else {}
    validation = pool_scores(site_metrics, config.tasks)
    gain_db = mean_gain_db(validation)
    # A mean over fewer tasks is not to be compared: without its hardest task any model looks better.
    if gain_db is not None and (len(validation), gain_db) > (state.best_num_tasks, state.best_gain_db):
        state = replace(state, best_round=number, best_gain_db=gain_db, best_num_tasks=len(validation))

    record = {
        "round": number,
        "num_rounds": config.num_rounds,
        "started_at": started_at.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
        "model_sha256": model_hash(state.model),
        "update_norm": math.hypot(shared.length(aggregation_weight), *own.norms().values()),
        "task_update_norms": (shared + own).norms(),
        "cosines": shared.cosines() if grams else {},
        "group_cosines": {group: gram.cosines() for group, gram in grams.items()},
        "sites": collected.sites,
        "frozen_tasks": sorted(set(config.tasks) - set(stats)),
        "mean_gain_db": gain_db,
        "site_gain_db": gain_by_site(site_metrics, config.tasks),
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
    if came:
        record |= {"came": {name: {"patients": info.patients, **info.says} for name, info in sorted(came.items())}}
        record |= {"versions": journal.versions()}
    journal.append_record(folder, record)
    journal.save_state(folder, state)
    release(folder, config, state)
    journal.clear_spool(folder, number)
    log.info("%s", describe_round(record))
    return state


def release(folder: Path, config: RunConfig, state: ServerState) -> None:
    """Write ``model.safetensors`` if the state's model is the best so far, or if none was scored.

    After the journal, and again when a run goes on: so the file never holds a model that the journal does not know.
    """
    if state.round and state.best_round in (state.round, 0):
        facts = {"run": config.name, "round": state.round, "seed": config.seed}
        facts |= {"gain_db": state.best_gain_db if state.best_round else None}
        save_model(folder / "model.safetensors", state.released, config.model, facts)


def step(
    state: ServerState, replies: Mapping[str, Spooled], shares: Mapping[str, float], federation: FederationConfig
) -> tuple[dict[str, np.ndarray], dict[str, Moments], dict[str, Gram], Gram]:
    """The new model: a pure function of the old state and the round's folder, parameter by parameter.

    What is a task's own follows its sites alone, and stays as it is when none of them reported. Also returns the inner products
    of the tasks' updates of each group of shared parameters, and those of what is the tasks' own with themselves.
    """
    turns = federation.combination == "conflict_averse"
    shared = [key for key in state.model if owner_of(key)[0] is None]
    grams = {group: Gram(shares) for group in GROUPS if any(group_of(key) == group for key in shared)}
    if turns:
        for key, means in task_means(replies, shared):
            grams[group_of(key)].add(means)
    coefficients = {group: _coefficients(gram, shares, federation) for group, gram in grams.items()}
    own = Gram(shares)
    model, moments = dict(state.model), dict(state.moments)
    for key, means in task_means(replies, list(state.model)):
        owner = owner_of(key)[0]
        if owner is None:
            group = group_of(key)
            update = combine(means, coefficients[group])
            if not turns:
                grams[group].add(means)
        elif owner in means:
            update = means[owner]
            own.add_own(owner, update)
        else:
            continue
        before = moments.get(key, Moments())
        model[key], moments[key] = advance(federation.server_optimiser, model[key], update, before, federation.server_lr)
    return model, moments, grams, own


def _coefficients(gram: Gram, shares: Mapping[str, float], federation: FederationConfig) -> Mapping[str, float]:
    if federation.combination == "shares":
        return shares
    weights = np.array([shares[task] for task in gram.tasks])
    turned = conflict_averse(gram.products, weights, federation.conflict_aversion)
    return dict(zip(gram.tasks, turned.tolist(), strict=True))


def move_average(
    average: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray], config: TrainConfig, number: int
) -> dict[str, np.ndarray]:
    """The exponential moving average after a round, with the decay per step raised to the round's steps.

    Early on the decay is lower, so that the first models are forgotten.
    """
    decay = min(config.ema_decay**config.local_steps, number / (number + 9))
    return {name: np.float32(decay) * average[name] + np.float32(1 - decay) * value for name, value in model.items()}


def ask_scores(
    kind: str,
    arrays: Mapping[str, np.ndarray],
    state: ServerState,
    config: RunConfig,
    sites: Sites,
    members: Mapping[str, SiteInfo],
) -> dict[str, Mapping[str, int | float]]:
    """What the sites report of their validation patients, by site; one that fails is left out.

    Parameters
    ----------
    kind : str
        ``evaluate`` scores `arrays`, ``train.fine_tune`` what each site makes of them for itself, ``train.baseline`` a model
        that each site trains alone.
    arrays, state, config, sites, members
    """
    metrics: dict[str, Mapping[str, int | float]] = {}
    instructions = instruct(arrays, {"run": state.run, "round": state.round, "nonce": state.nonce}, members, {})
    for news in sites.ask(kind, instructions, config.federation.round_timeout_s):
        if news is None:
            continue
        name, reply = news
        max_slices = config.evaluate.max_validation_slices
        fault = examine_scores(reply, instructions[name], tasks=members[name].tasks, max_slices=max_slices)
        if fault is None:
            metrics[name] = reply.metrics
        else:
            log.warning("round %d: the scores of %s are left out: %s", state.round, name, fault)
    return metrics


def describe_round(record: Mapping[str, Any]) -> str:
    """One line on a round, for the log."""
    scores = [
        f"{task} {v['restored']['psnr']:.2f} dB ({v['restored']['psnr'] - v['input']['psnr']:+.2f})"
        for task, facts in record["tasks"].items()
        if (v := facts.get("validation"))
    ]
    return f"round {record['round']}/{record['num_rounds']}: {', '.join(scores) or 'not scored'}; {record['seconds']:.1f} s"
