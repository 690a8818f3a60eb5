"""Models that stay at the hospital: the one it would have without the others, and the released one fitted to its own images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from client.consent import check_metrics
from client.site import Site
from client.state import load_optimiser
from client.work import (
    agreed_splits,
    answer_to,
    kept_at_site,
    name_seed,
    network_of,
    own_of,
    score_validation,
    trained_arrays,
    training_splits,
    verified,
)
from tat_core.checkpoint import read_model, replacing, save_model
from tat_core.config import RunConfig, config_to_dict
from tat_core.data.prepared import open_split, prepare
from tat_core.evaluate import evaluate_split
from tat_core.model.tat import TAT, build_model
from tat_core.packet import Packet
from tat_core.train import DivergedError, make_optimiser, train

log = logging.getLogger("fed_tat.site")

# What a run is called, where it is written and whether it goes on does not change what a hospital alone would learn.
_IRRELEVANT = ("name", "output_dir", "resume", "federation")

# What a hospital's few validation slices cannot tell from nothing: they vary by as much between runs with other seeds, and are
# often of the scanner, or even the patients, that the model was fitted to.
_CLEARLY_BETTER_DB = 0.1


def train_alone(site: Site, config: RunConfig, on_step: Callable[[int], None] | None = None) -> TAT:
    """Train the hospital's own model: the start, schedule and number of steps of the federated run, on its images alone."""
    model = build_model(config.model, config.seed)
    train(
        model,
        training_splits(site, config),
        config.train,
        rng=np.random.default_rng([config.seed, name_seed(site.name)]),
        num_steps=_steps_alone(config),
        device=site.device,
        on_step=on_step,
    )
    return model


def baseline_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Score the hospital's own model on its validation patients; it is trained once for a configuration and never leaves."""
    check_metrics(site, "scores")
    agreed_splits(site, config)
    relevant = {key: value for key, value in config_to_dict(config).items() if key not in _IRRELEVANT}
    relevant["steps"] = _steps_alone(config)
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    path = site.state_dir / "alone" / f"{digest}.json"
    if path.is_file():
        metrics = json.loads(path.read_text())
    else:
        model = train_alone(site, config)
        metrics = score_validation(site, config, lambda _task: model)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics))
    return Packet({}, metrics, answer_to(instruction, site))


def _steps_alone(config: RunConfig) -> int:
    """As many as the hospital takes in the run and after it."""
    return config.local_steps_in_all + config.federation.fine_tune_steps


def fine_tune(site: Site, config: RunConfig, arrays: dict[str, np.ndarray], run: str = "") -> dict[str, np.ndarray]:
    """Fit a released model to the hospital's own images: every parameter, for ``federation.fine_tune_steps`` steps.

    The optimiser goes on with its state after the last round, if the site has it: the first steps of a fresh AdamW are as long
    for every parameter as the learning rate, and would throw a trained network off.

    Parameters
    ----------
    site : Site
    config : RunConfig
    arrays : dict of key to array
        Shared parameters and the tasks' own (`tat_core.sharing`).
    run : str, optional
        The run's identity, by which the site keeps its optimiser's state.

    Returns
    -------
    dict of key to array
        The same keys; tasks that the hospital lacks keep their own.
    """
    splits = agreed_splits(site, config)
    own = {task: own_of(arrays, task) for task in splits}
    model = network_of(config, arrays, next(iter(splits))).to(site.device)
    optimiser = make_optimiser(model, config.train)
    if run:
        load_optimiser(site, run, config.num_rounds + 1, optimiser)
    train(
        model,
        splits,
        config.train,
        rng=np.random.default_rng([config.seed, name_seed(site.name), config.num_rounds + 1]),
        num_steps=config.federation.fine_tune_steps,
        device=site.device,
        optimiser=optimiser,
        own=own,
    )
    return arrays | {key: value for key, value in trained_arrays(model, own).items() if key in arrays}


def kept_model(site: Site, config: RunConfig) -> Path:
    """The file of the released model that was fitted to the hospital's own images."""
    return site.state_dir / "models" / f"{config.name}.safetensors"


def fine_tune_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Keep the better of the released model and what fitting makes of it under ``models/``, and score it; it never leaves.

    Fitted is better if it gains 0.1 dB more on all the hospital's validation patients. Without any the released model is kept as
    it is: nothing could tell whether fitting it to few images has made it worse on others.
    """
    released = verified(instruction)
    agreed_splits(site, config)
    run, base = str(instruction.config["run"]), str(instruction.config["base"])
    path = kept_model(site, config)
    if not path.is_file() or read_model(path).metadata["extra"].get("fine_tuned_from") != base:
        start = released | kept_at_site(site, config, run, int(instruction.config["round"]))
        arrays, steps = _better(site, config, start, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, arrays, config.model, {"run": config.name, "fine_tuned_from": base, "steps": steps})
    kept = read_model(path)
    return Packet({}, score_validation(site, config, lambda task: kept.network(task)), answer_to(instruction, site))


def _better(site: Site, config: RunConfig, start: dict[str, np.ndarray], run: str) -> tuple[dict[str, np.ndarray], int]:
    """The released model with 0, or the fitted one with the steps that made it."""
    gain_db = _validation_gain_db(site, config, start)
    if gain_db is None:
        log.info("fine-tuning: no validation patients, so the released model is kept as it is")
        return start, 0
    try:
        fitted = fine_tune(site, config, start, run)
    except DivergedError as error:
        log.warning("fine-tuning: %s; the released model is kept", error)
        return start, 0
    fitted_gain_db = _validation_gain_db(site, config, fitted)
    assert fitted_gain_db is not None, "the same slices"
    log.info("fine-tuning: %+.3f dB on the validation patients; the released model %+.3f dB", fitted_gain_db, gain_db)
    better = fitted_gain_db >= gain_db + _CLEARLY_BETTER_DB
    return (fitted, config.federation.fine_tune_steps) if better else (start, 0)


def _validation_gain_db(site: Site, config: RunConfig, arrays: dict[str, np.ndarray]) -> float | None:
    """PSNR over the input on all validation slices, mean over the tasks that have any; None if no task has."""
    gains = []
    for task in agreed_splits(site, config):
        split = open_split(prepare(site.data[task]), "validation")
        scores = evaluate_split(network_of(config, arrays, task).prepare_to_restore(), split, config.evaluate, site.device)
        if scores["input"].count:
            gains.append(scores["restored"].mean()["psnr"] - scores["input"].mean()["psnr"])
    return float(np.mean(gains)) if gains else None
