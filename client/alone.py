"""What a hospital would have without the others: its own model, from the same start and with the same number of steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np

from client.consent import check_metrics
from client.site import Site
from client.work import agreed_splits, answer_to, name_seed, score_validation, training_splits
from tat_core.checkpoint import replacing
from tat_core.config import RunConfig, config_to_dict
from tat_core.model.tat import TAT, build_model
from tat_core.packet import Packet
from tat_core.train import train

# What a run is called, where it is written and whether it goes on does not change what a hospital alone would learn.
_IRRELEVANT = ("name", "output_dir", "resume", "federation")


def train_alone(site: Site, config: RunConfig, on_step: Callable[[int], None] | None = None) -> TAT:
    """Train the hospital's own model: the start, schedule and number of steps of the federated run, on its images alone."""
    model = build_model(config.model, config.seed)
    train(
        model,
        training_splits(site, config),
        config.train,
        rng=np.random.default_rng([config.seed, name_seed(site.name)]),
        num_steps=config.num_rounds * config.train.local_steps,
        device=site.device,
        on_step=on_step,
    )
    return model


def baseline_round(site: Site, config: RunConfig, instruction: Packet) -> Packet:
    """Score the hospital's own model on its validation patients; it is trained once for a configuration and never leaves."""
    check_metrics(site, "scores")
    agreed_splits(site, config)
    relevant = {key: value for key, value in config_to_dict(config).items() if key not in _IRRELEVANT}
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
