"""Does anybody lose by taking part? Each site's gain by the released model beside that by models of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from tat_core.checkpoint import replacing
from tat_core.config import FederationConfig

log = logging.getLogger("fed_tat.server")

COMPARISON = "hospitals.json"


def wanted_models(federation: FederationConfig) -> dict[str, str]:
    """Which models are compared at the end, and the kind of message that a site answers with its scores of each."""
    models = {"together": "evaluate"}
    if federation.fine_tune_steps:
        models["fine_tuned"] = "train.fine_tune"
    if federation.baseline:
        models["alone"] = "train.baseline"
    return models


def write_comparison(folder: Path, gain_db: Mapping[str, Mapping[str, float]]) -> None:
    """Write ``hospitals.json``, and warn of every site that is better off alone.

    Parameters
    ----------
    folder : Path
        The run's.
    gain_db : mapping of model to (mapping of site name to float)
        Of ``together``, ``fine_tuned`` and ``alone``: mean gain in PSNR over the input on the site's validation patients. A
        site that lacks one is left out.
    """
    names = sorted(set.intersection(*(set(by_site) for by_site in gain_db.values())))
    sites = {name: {f"{model}_gain_db": by_site[name] for model, by_site in gain_db.items()} for name in names}
    with replacing(folder / COMPARISON) as temporary:
        temporary.write_text(json.dumps({"sites": sites}, indent=1))
    for name, facts in sites.items():
        gains = ", ".join(f"{model} {by_site[name]:+.2f} dB" for model, by_site in gain_db.items())
        log.log(logging.WARNING if is_better_alone(facts) else logging.INFO, "%s: %s", name, gains)


def is_better_alone(gains: Mapping[str, float]) -> bool:
    """Whether a site's own training beats all that the others' could give it."""
    others = [gain for name, gain in gains.items() if name != "alone_gain_db"]
    return "alone_gain_db" in gains and gains["alone_gain_db"] > max(others)
