"""The one way out of a hospital: every reply is built here, from a list of what may leave.

A reply holds arrays with the names and shapes of the model that arrived, sums and counts per task, and words out of closed lists.
Anything else is not left out but stops the reply: it would be a fault of ours, and a hospital has to hear of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from client.consent import CODES, PATIENT_RANGES, SiteRefusalError
from client.site import Site
from tat_core.loss import TaskStats
from tat_core.metrics import Scores
from tat_core.packet import Packet
from tat_core.tasks import TASKS

_ARMS = ("input", "restored")
_LOSSES = {f"{task}.{entry.name}" for task in TASKS for entry in fields(TaskStats)}
_SCORES = {f"{task}.{arm}.{entry.name}" for task in TASKS for arm in _ARMS for entry in fields(Scores)}
_ALLOWED = {"losses": _LOSSES, "scores": _SCORES}
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+]{0,39}")


def outgoing(reply: Packet, instruction: Packet, site: Site) -> Packet:
    """What of a reply leaves.

    Parameters
    ----------
    reply : Packet
    instruction : Packet
        What the reply answers: an update has its arrays' names and shapes, and states its round and base version.
    site : Site
        Says which metrics may leave, and with how many digits.

    Raises
    ------
    SiteRefusalError
        The reply holds something that may not leave.
    """
    if reply.arrays and {k: v.shape for k, v in reply.arrays.items()} != {k: v.shape for k, v in instruction.arrays.items()}:
        raise SiteRefusalError("NOT_ALLOWED_OUT", "the update's names or shapes are not the model's")
    for key, value in reply.config.items():
        if type(value) not in (str, int) or not _is_allowed_word(key, value, instruction, site):
            raise SiteRefusalError("NOT_ALLOWED_OUT", f"{key} = {value!r}")
    allowed = set[str]().union(*(_ALLOWED[kind] for kind in site.metrics))
    for key, number in reply.metrics.items():
        if key not in allowed or type(number) not in (int, float) or not math.isfinite(number):
            raise SiteRefusalError("NOT_ALLOWED_OUT", f"{key} = {number!r}; site.yaml lets {', '.join(site.metrics)} leave")
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in reply.arrays.items()}
    return Packet(arrays, rounded(reply.metrics, site.metric_digits), dict(reply.config))


def refusal(code: str, name: str | None = None) -> Packet:
    """A reply that says no: a code of `CODES`, and the site's name where it is known."""
    assert code in CODES, code
    return Packet(config={"error": code} if name is None else {"site": name, "error": code})


def rounded(metrics: Mapping[str, int | float], digits: int) -> dict[str, int | float]:
    """Sums and counts with less detail: means keep a few digits, the number of scored slices is a power of two.

    A training count stays, for the run's own settings decide it. The coordinator divides sums by counts, so that a sum is
    the rounded mean times the count that leaves; what held for the mean, such as lying in 0..1, still does.
    """
    result: dict[str, int | float] = {}
    for key, value in metrics.items():
        group = key.rpartition(".")[0]
        count = metrics[f"{group}.count"]
        shown = 2 ** int(math.log2(count)) if count and key in _SCORES else count
        is_count = key == f"{group}.count"
        result[key] = shown if is_count else float(f"{value / count:.{digits - 1}e}") * shown if count else 0.0
    return result


def _is_allowed_word(key: str, value: Any, instruction: Packet, site: Site) -> bool:
    match key:
        case "site":
            return bool(value == site.name)
        case "round" | "base" | "nonce":
            return bool(value == instruction.config.get(key))
        case "tasks":
            return set(str(value).split(",")) <= set(site.data)
        case "patients":
            return value in PATIENT_RANGES
        case "fed_tat" | "torch":
            return _VERSION.fullmatch(str(value)) is not None
        case _:
            return False
