"""What a reply must be before it may touch the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tat_core.packet import Packet, metrics_to_stats


def fault_in(reply: Packet, instruction: Packet, *, tasks: tuple[str, ...], max_samples: int, longest: float) -> str | None:
    """Why a reply must not be aggregated, as a code; None if it may.

    Parameters
    ----------
    reply : Packet
    instruction : Packet
        What the site was sent: an update has the names, shapes and type of its arrays, and its round and base version.
    tasks : tuple of str
        Tasks that the site said it has.
    max_samples : int
        Samples that the site was asked to train on; no count may be above it.
    longest : float
        An update longer than this (L2, over all parameters) is not one of training.
    """
    if reply.error is not None:
        return reply.error
    if any(reply.config.get(key) != instruction.config[key] for key in ("round", "base")):
        return "STALE"
    if set(reply.arrays) != set(instruction.arrays):
        return "WRONG_NAMES"
    for name, value in reply.arrays.items():
        if value.shape != instruction.arrays[name].shape:
            return "WRONG_SHAPE"
        if value.dtype != np.float32:
            return "WRONG_TYPE"
    norm = length(reply.arrays)
    if not math.isfinite(norm):
        return "NOT_FINITE"
    if norm > longest:
        return "ABSURD_LENGTH"
    return _fault_in_statistics(reply, tasks, max_samples)


def length(arrays: Mapping[str, np.ndarray]) -> float:
    """L2 norm over all arrays; NaN or infinite if any value is, or if float32 cannot hold its square."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(sum(float(np.square(value).sum(dtype=np.float64)) for value in arrays.values()))


def _fault_in_statistics(reply: Packet, tasks: tuple[str, ...], max_samples: int) -> str | None:
    try:
        stats = metrics_to_stats(reply.metrics)
    except (KeyError, TypeError):
        return "BAD_STATISTICS"
    if not stats or not set(stats) <= set(tasks):
        return "WRONG_TASKS"
    for s in stats.values():
        if not isinstance(s.count, int) or not 0 < s.count <= max_samples:
            return "BAD_COUNT"
        # Images are in [0, 1] but the network's output may overshoot: an L1 of 10 is far outside anything that trains.
        sums = (s.input_sum, s.change_sum, s.loss_sum, s.loss_square_sum)
        limits = (s.count, 10.0 * s.count, 10.0 * s.count, 100.0 * s.count)
        if not all(math.isfinite(value) and 0 <= value <= limit for value, limit in zip(sums, limits, strict=True)):
            return "BAD_STATISTICS"
    return None
