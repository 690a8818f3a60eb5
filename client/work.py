"""What a site does with an instruction: describe itself, train, evaluate. Knows nothing of Flower."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from client import audit, ledger
from client.consent import SiteRefusalError, agreed_tasks, check_metrics, patient_bucket
from client.outgoing import outgoing, refusal
from client.site import Site
from client.state import keep_reply, load_optimiser, load_own, load_reply, pause_file, save_optimiser, save_own
from tat_core.blobs import packed_bytes
from tat_core.checkpoint import arrays_of, load_arrays, model_hash
from tat_core.config import RunConfig, config_to_dict
from tat_core.data.prepared import PreparedSplit, open_split, prepare
from tat_core.dpsgd import PatientSgd, patient_sgd
from tat_core.evaluate import evaluate_split
from tat_core.groups import group_of
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import TAT, build_model
from tat_core.packet import Packet, echo, stats_to_metrics
from tat_core.sharing import owner_of, view
from tat_core.train import make_optimiser, train

log = logging.getLogger("fed_tat.site")

Action = Callable[[Site, RunConfig, Packet], Packet]
# What of a run's configuration decides what a round's reply is.
_DECISIVE = ("seed", "num_rounds", "tasks", "model", "train", "privacy")


def describe(site: Site, config: RunConfig, _: Packet) -> Packet:
    """Tasks that the site offers to this run, its size as a range, and its versions."""
    splits = agreed_splits(site, config)
    return Packet(
        config={
            "site": site.name,
            "tasks": ",".join(splits),
            "patients": patient_bucket(sum(split.num_patients for split in splits.values())),
            "fed_tat": version("fed-tat"),
            "torch": str(torch.__version__),
        }
    )


def train_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Train from the global model for the round's local steps and reply with the update and its statistics.

    The privacy ledger is charged before the first image is read. A private round that is asked for again is answered by the
    reply of the first time.
    """
    steps = int(instruction.config["steps"])
    if not 0 < steps <= config.train.local_steps:
        raise SiteRefusalError("BAD_STEPS", f"{steps} local steps are asked for where the run has {config.train.local_steps}")
    check_metrics(site, "losses")
    verified(instruction)
    splits = agreed_splits(site, config)
    marks = ledger.marks_of(splits.values())
    run, release = str(instruction.config["run"]), _release(config, instruction, marks)
    private = patient_sgd(config, splits) if config.privacy.enabled else None
    charge = None if private is None else [(private.noise_multiplier, private.sample_rate, steps)]
    is_settled = ledger.reserve(site, release, marks, run, int(instruction.config["round"]), charge)
    if private is None:
        reply = _train(site, config, instruction, splits)
    else:
        kept = load_reply(site, run, release)
        if kept is None and is_settled:
            raise SiteRefusalError("ALREADY_ANSWERED", "this private round was answered, and its reply is no longer on disk")
        reply = kept or keep_reply(site, run, release, _train(site, config, instruction, splits, private))
        # A coordinator that went back to an earlier state asks for the same round by another nonce.
        reply = replace(reply, config=answer_to(instruction, site))
    ledger.settle(site, release)
    return reply


def _release(config: RunConfig, instruction: Packet, marks: Sequence[str]) -> str:
    """A hash of everything that a round's reply is made from."""
    decisive = {key: value for key, value in config_to_dict(config).items() if key in _DECISIVE}
    decisive["update_precision"] = config.federation.update_precision
    asked = {key: instruction.config[key] for key in ("run", "round", "base", "steps")}
    return hashlib.sha256(json.dumps([decisive, asked, sorted(marks)], sort_keys=True).encode()).hexdigest()


def _train(
    site: Site, config: RunConfig, instruction: Packet, splits: dict[str, PreparedSplit], private: PatientSgd | None = None
) -> Packet:
    arrays, tasks = instruction.arrays, list(splits)
    run, round_number = str(instruction.config["run"]), int(instruction.config["round"])
    own = {task: own_of(arrays, task) for task in tasks}
    kept = kept_at_site(site, config, run, round_number - 1)
    model = network_of(config, arrays | kept, tasks[0])
    optimiser = make_optimiser(model.to(site.device), config.train)
    if config.train.keep_optimiser:
        load_optimiser(site, run, round_number, optimiser)
    result = train(
        model,
        splits,
        config.train,
        rng=np.random.default_rng([config.seed, name_seed(site.name), round_number]),
        num_steps=int(instruction.config["steps"]),
        first_step=(round_number - 1) * config.train.local_steps,
        total_steps=config.local_steps_in_all,
        device=site.device,
        optimiser=optimiser,
        own=own,
        task_weight={task: float(instruction.config.get(f"{task}.weight", 1.0)) for task in tasks},
        private=private,
    )
    if config.train.keep_optimiser:
        save_optimiser(site, run, round_number, optimiser)
    if kept:
        save_own(site, run, round_number, {name: value for name, value in arrays_of(model).items() if name in kept})
    trained = trained_arrays(model, own)
    update = {key: trained[key] - value for key, value in arrays.items()}
    if config.federation.update_precision == "bf16":
        update = {key: torch.from_numpy(value).bfloat16().float().numpy() for key, value in update.items()}
    log.info("round %d: %d steps in %.1f s", round_number, result.steps, result.seconds)
    return Packet(update, stats_to_metrics(result.stats), answer_to(instruction, site))


def evaluate_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Score the global model on the site's validation patients; sums and counts are all that leaves."""
    arrays = verified(instruction)
    arrays = arrays | kept_at_site(site, config, str(instruction.config["run"]), int(instruction.config["round"]))
    metrics = score_validation(site, config, lambda task: network_of(config, arrays, task).prepare_to_restore())
    return Packet({}, metrics, answer_to(instruction, site))


def answer_to(instruction: Packet, site: Site) -> dict[str, str | int | float | bool]:
    """Who answers, and what: the words of every reply to a round's instruction."""
    return {"site": site.name, **echo(instruction)}


def score_validation(site: Site, config: RunConfig, network_for: Callable[[str], TAT]) -> dict[str, int | float]:
    """Sums and counts of a model's scores on the validation patients, by task; a task without any is absent.

    With differential privacy there are none: they are exact, and what leaves must not be (tat_core/dpsgd.py).
    """
    metrics: dict[str, int | float] = {}
    tasks = list(agreed_splits(site, config))
    if config.privacy.enabled:
        return metrics
    check_metrics(site, "scores")
    for task in tasks:
        split = _split(site, task, "validation")
        if len(split):
            limit = config.evaluate.max_validation_slices
            scores = evaluate_split(network_for(task), split, config.evaluate, device=site.device, max_slices=limit)
            for arm, score in scores.items():
                metrics |= {f"{task}.{arm}.{name}": value for name, value in asdict(score).items()}
    return metrics


def training_splits(site: Site, config: RunConfig) -> dict[str, PreparedSplit]:
    """The site's training slices of the run's tasks, for the hospital's own use; opens the files, reads no pixel."""
    return {task: _split(site, task, "train") for task in config.tasks if task in site.data}


def agreed_splits(site: Site, config: RunConfig) -> dict[str, PreparedSplit]:
    """The training slices that the hospital lets this run use.

    Raises
    ------
    SiteRefusalError
        None at all.
    """
    splits = training_splits(site, config)
    return {
        task: splits[task] for task in agreed_tasks(site, config, {task: split.num_patients for task, split in splits.items()})
    }


def handle(action: Action, site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Run one action, let what is allowed leave, and write that down; whatever goes wrong leaves as a code without text."""
    try:
        torch.set_num_threads(config.train.num_threads)
        torch.use_deterministic_algorithms(True, warn_only=site.device != "cpu")
        tune_allocator()
        _refuse_if_paused(site)
        reply = outgoing(action(site, config, instruction), instruction, site)
        _refuse_if_paused(site)  # nothing leaves a site that was paused meanwhile
        _write_down(site, action.__name__, instruction, reply)
        return reply
    except SiteRefusalError as error:
        log.warning("refused: %s", error)
        code = error.code
    except ValueError:
        log.exception("refused")
        code = "BAD_INPUT"
    except MemoryError:
        log.exception("failed")
        code = "OUT_OF_MEMORY"
    except OSError:
        log.exception("failed")
        code = "SITE_IO"
    except Exception:
        log.exception("failed")
        code = "SITE_ERROR"
    return refuse(site, action, instruction, code)


def refuse(site: Site, action: Action, instruction: Packet, code: str) -> Packet:
    """Say no by a code; it leaves even if the audit log cannot be written, since it says nothing of the data."""
    reply = refusal(code, site.name)
    try:
        _write_down(site, action.__name__, instruction, reply)
    except Exception:
        log.exception("the audit log cannot be written")
    return reply


def _write_down(site: Site, kind: str, instruction: Packet, reply: Packet) -> None:
    """Enter a reply that is about to leave into the audit log: its words and numbers in full, its arrays by their hash."""
    run, round_number = (str(instruction.config.get(key, ""))[:64] for key in ("run", "round"))
    facts: dict[str, Any] = {"kind": kind, "run": run, "round": round_number, "words": reply.config, "metrics": reply.metrics}
    if reply.arrays:
        facts |= {"arrays": len(reply.arrays), "bytes": packed_bytes(reply.arrays), "sha256": model_hash(reply.arrays)}
        facts |= ledger.spent_in(site, run, int(round_number))
    audit.append(site, facts)


def _refuse_if_paused(site: Site) -> None:
    if pause_file(site).exists():
        raise SiteRefusalError("PAUSED", "`tat site resume` lets the site take part again")


def name_seed(name: str) -> int:
    """A stable 32-bit number from a name, so that each site draws its own patches."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _split(site: Site, task: str, split: str) -> PreparedSplit:
    found = open_split(prepare(site.data[task]), split)
    if found.task.name != task:
        raise ValueError(f"site: expected {task} in data.{task}, got a data set of {found.task.name}; correct site.yaml")
    return found


def verified(instruction: Packet) -> dict[str, np.ndarray]:
    """The arrays that came with an instruction, checked against the version that the coordinator states."""
    if model_hash(instruction.arrays) != instruction.config["base"]:
        raise SiteRefusalError("BASE_MISMATCH", "the model that arrived does not have the hash that the coordinator states")
    return instruction.arrays


def kept_at_site(site: Site, config: RunConfig, run: str, round_number: int) -> dict[str, np.ndarray]:
    """The parameters that never leave the site, as they were after a round."""
    groups = config.federation.site_groups
    if not groups:
        return {}
    start = arrays_of(build_model(config.model, config.seed))
    return {name: value for name, value in start.items() if group_of(name) in groups} | load_own(site, run, round_number)


def network_of(config: RunConfig, arrays: dict[str, np.ndarray], task: str) -> TAT:
    """The network as it is for one task."""
    model = TAT(config.model)
    load_arrays(model, view(arrays, task))
    return model


def own_of(arrays: dict[str, np.ndarray], task: str) -> dict[str, torch.Tensor]:
    """Copies of a task's own parameters, by name in the network, for `tat_core.train.train` to change."""
    keys = [(key, name) for key in arrays for owner, name in [owner_of(key)] if owner == task]
    return {name: torch.from_numpy(arrays[key].copy()) for key, name in keys}


def trained_arrays(model: TAT, own: dict[str, dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """What training left: the network's parameters, and the tasks' own under their keys."""
    return arrays_of(model) | {f"{task}:{name}": value.cpu().numpy() for task in own for name, value in own[task].items()}
