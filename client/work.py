"""What a site does with an instruction: describe itself, train, evaluate. Knows nothing of Flower."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import torch

from client.site import Site
from client.state import load_optimiser, save_optimiser
from tat_core.checkpoint import arrays_of, load_arrays, model_hash
from tat_core.config import RunConfig
from tat_core.data.prepared import PreparedSplit, open_split, prepare
from tat_core.dpsgd import patient_sgd
from tat_core.evaluate import evaluate_split
from tat_core.model.allocator import tune_allocator
from tat_core.model.tat import TAT
from tat_core.packet import Packet, stats_to_metrics
from tat_core.sharing import owner_of, view
from tat_core.train import make_optimiser, train

log = logging.getLogger("fed_tat.site")


class SiteRefusalError(Exception):
    """The site will not do what was asked. Only the code leaves the site; the reason goes to its own log."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


def patient_bucket(num_patients: int) -> str:
    """How many patients a site says it has: a range, never the number."""
    for low, high in ((1, 10), (11, 50), (51, 200), (201, 1000)):
        if num_patients <= high:
            return f"{low}-{high}"
    return ">1000"


def describe(site: Site, config: RunConfig, _: Packet) -> Packet:
    """Tasks that the site offers to this run, its size as a range, and its versions."""
    tasks = [task for task in config.tasks if task in site.data]
    patients = sum(_split(site, task, "train").num_patients for task in tasks)
    return Packet(
        config={
            "site": site.name,
            "tasks": ",".join(tasks),
            "patients": patient_bucket(patients),
            "fed_tat": version("fed-tat"),
            "torch": torch.__version__,
        }
    )


def train_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Train from the global model for the round's local steps and reply with the update and its statistics."""
    started = time.perf_counter()
    round_number = int(instruction.config["round"])
    steps = int(instruction.config["steps"])
    if not 0 < steps <= config.train.local_steps:
        raise SiteRefusalError("BAD_STEPS", f"{steps} local steps are asked for where the run has {config.train.local_steps}")
    arrays = _verified(instruction)
    tasks = [task for task in config.tasks if task in site.data]
    own = {task: _own(arrays, task) for task in tasks}
    model = _network(config, arrays, tasks[0])
    optimiser = make_optimiser(model.to(site.device), config.train)
    run = str(instruction.config["run"])
    if config.train.keep_optimiser:
        load_optimiser(site, run, round_number, optimiser)
    splits = training_splits(site, config)
    private = patient_sgd(config, splits) if config.privacy.enabled else None
    result = train(
        model,
        splits,
        config.train,
        rng=np.random.default_rng([config.seed, name_seed(site.name), round_number]),
        num_steps=steps,
        first_step=(round_number - 1) * config.train.local_steps,
        total_steps=config.num_rounds * config.train.local_steps,
        device=site.device,
        optimiser=optimiser,
        own=own,
        private=private,
    )
    if config.train.keep_optimiser:
        save_optimiser(site, run, round_number, optimiser)
    trained = arrays_of(model) | {f"{task}:{name}": value.cpu().numpy() for task in tasks for name, value in own[task].items()}
    update = {key: trained[key] - value for key, value in arrays.items()}
    log.info("round %d: %d steps in %.1f s", round_number, result.steps, result.seconds)
    return Packet(
        update,
        {**stats_to_metrics(result.stats), "seconds": time.perf_counter() - started},
        {"site": site.name, "round": round_number, "base": str(instruction.config["base"])},
    )


def evaluate_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Score the global model on the site's validation patients; sums and counts are all that leaves."""
    arrays = _verified(instruction)
    metrics = score_validation(site, config, lambda task: _network(config, arrays, task))
    return Packet({}, metrics, {"site": site.name, **{key: instruction.config[key] for key in ("round", "base")}})


def score_validation(site: Site, config: RunConfig, network_for: Callable[[str], TAT]) -> dict[str, int | float]:
    """Sums and counts of a model's scores on the validation patients, by task; a task without any is absent.

    With differential privacy there are none: they are exact, and what leaves must not be (tat_core/dpsgd.py).
    """
    metrics: dict[str, int | float] = {}
    if config.privacy.enabled:
        return metrics
    for task in (t for t in config.tasks if t in site.data):
        split = _split(site, task, "validation")
        if len(split):
            limit = config.evaluate.max_validation_slices
            scores = evaluate_split(network_for(task), split, config.evaluate, device=site.device, max_slices=limit)
            for arm, score in scores.items():
                metrics |= {f"{task}.{arm}.{name}": value for name, value in asdict(score).items()}
    return metrics


def training_splits(site: Site, config: RunConfig) -> dict[str, PreparedSplit]:
    """The site's training slices of the run's tasks."""
    return {task: _split(site, task, "train") for task in config.tasks if task in site.data}


def handle(action: Callable[[Site, RunConfig, Packet], Packet], site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Run one action; whatever goes wrong leaves the site as a code without text."""
    torch.set_num_threads(config.train.num_threads)
    torch.use_deterministic_algorithms(True, warn_only=site.device != "cpu")
    tune_allocator()
    try:
        return action(site, config, instruction)
    except SiteRefusalError as refusal:
        log.warning("refused: %s", refusal)
        code = refusal.code
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
    return Packet(config={"site": site.name, "error": code})


def name_seed(name: str) -> int:
    """A stable 32-bit number from a name, so that each site draws its own patches."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _split(site: Site, task: str, split: str) -> PreparedSplit:
    return open_split(prepare(site.data[task]), split)


def _verified(instruction: Packet) -> dict[str, np.ndarray]:
    """The arrays that came with an instruction, checked against the version that the coordinator states."""
    if model_hash(instruction.arrays) != instruction.config["base"]:
        raise SiteRefusalError("BASE_MISMATCH", "the model that arrived does not have the hash that the coordinator states")
    return instruction.arrays


def _network(config: RunConfig, arrays: dict[str, np.ndarray], task: str) -> TAT:
    model = TAT(config.model)
    load_arrays(model, view(arrays, task))
    return model


def _own(arrays: dict[str, np.ndarray], task: str) -> dict[str, torch.Tensor]:
    keys = [(key, name) for key in arrays for owner, name in [owner_of(key)] if owner == task]
    return {name: torch.from_numpy(arrays[key].copy()) for key, name in keys}
