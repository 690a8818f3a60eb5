"""What travels between coordinator and site, independent of how it travels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from tat_core.loss import TaskStats

ECHOED = ("round", "base", "nonce")
"""What a reply repeats of its instruction: the round, the model and the round's nonce, so that no other reply passes for it."""

_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,39}")


@dataclass(frozen=True)
class Packet:
    """One instruction or one reply.

    Attributes
    ----------
    arrays : dict of parameter name to float32 array
        The model on the way out, the update (local minus global) on the way back.
    metrics : dict of str to int or float
        ``<TASK>.count``, ``<TASK>.<statistic>``, ….
    config : dict of str to scalar
        Round, base version, names, versions; ``error`` holds a code when a site refuses.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, int | float] = field(default_factory=dict)
    config: dict[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def error(self) -> str | None:
        """The code with which a site refused or failed, if it did; what is not a code never gets further than this."""
        code = self.config.get("error")
        if code is None:
            return None
        return str(code) if _CODE.fullmatch(str(code)) else "UNKNOWN_ERROR"


def echo(instruction: Packet) -> dict[str, str | int | float | bool]:
    """The part of an instruction that its reply repeats."""
    return {key: instruction.config[key] for key in ECHOED}


def stats_to_metrics(stats: Mapping[str, TaskStats]) -> dict[str, int | float]:
    """Flatten by-task statistics to ``<TASK>.<field>``."""
    return {f"{task}.{name}": value for task, s in sorted(stats.items()) for name, value in asdict(s).items()}


def metrics_to_stats(metrics: Mapping[str, int | float]) -> dict[str, TaskStats]:
    """The inverse of `stats_to_metrics`; other metrics are passed over."""
    names = [f.name for f in fields(TaskStats)]
    tasks = sorted({key.split(".")[0] for key in metrics if key.endswith(".loss_sum")})
    return {task: TaskStats(**{name: metrics[f"{task}.{name}"] for name in names}) for task in tasks}  # type: ignore[arg-type]
