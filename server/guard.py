"""What a reply must be before it may touch the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from server.scores import read_scores
from tat_core.metrics import MAX_PSNR_DB
from tat_core.packet import Packet, echo, metrics_to_stats


def examine(
    reply: Packet, instruction: Packet, *, tasks: tuple[str, ...], max_samples: int, longest: float
) -> tuple[str | None, float]:
    """Why a reply must not be aggregated, and how long its update is.

    Parameters
    ----------
    reply : Packet
    instruction : Packet
        What the site was sent: an update has the names, shapes and type of its arrays, and repeats its round, base and nonce.
    tasks : tuple of str
        Tasks that the site said it has.
    max_samples : int
        Samples that the site was asked to train on; no count may be above it.
    longest : float
        An update longer than this (L2, over all parameters) is not one of training.

    Returns
    -------
    fault : str or None
        A code; None if the reply may be aggregated.
    norm : float
        L2 norm of the update; 0 if the reply was refused before it was computed.
    """
    if reply.error is not None:
        return reply.error, 0.0
    if not answers(reply, instruction):
        return "STALE", 0.0
    if set(reply.arrays) != set(instruction.arrays):
        return "WRONG_NAMES", 0.0
    for name, value in reply.arrays.items():
        if value.shape != instruction.arrays[name].shape:
            return "WRONG_SHAPE", 0.0
        if value.dtype != np.float32:
            return "WRONG_TYPE", 0.0
    fault = _fault_in_statistics(reply, tasks, max_samples)
    if fault is not None:
        return fault, 0.0
    norm = length(reply.arrays)
    if not math.isfinite(norm):
        return "NOT_FINITE", norm
    return ("ABSURD_LENGTH" if norm > longest else None), norm


def answers(reply: Packet, instruction: Packet) -> bool:
    """Whether a reply is to this very instruction: of its round, its model and its nonce."""
    return echo(instruction).items() <= reply.config.items()


def examine_scores(reply: Packet, instruction: Packet, *, tasks: tuple[str, ...], max_slices: int) -> str | None:
    """Why a site's scores must not be counted, as a code; None if they may be.

    Parameters
    ----------
    reply, instruction : Packet
    tasks : tuple of str
        Tasks that the site said it has.
    max_slices : int
        Slices that it was asked to score of each.
    """
    if reply.error is not None:
        return reply.error
    if not answers(reply, instruction):
        return "STALE"
    for validation in read_scores(reply.metrics, tasks).values():
        for s in (validation.input, validation.restored):
            if not isinstance(s.count, int) or not 0 < s.count <= max_slices:
                return "BAD_COUNT"
            sums, limits = (s.psnr_sum, s.ssim_sum, s.rmse_sum), (MAX_PSNR_DB, 1.0 + 1e-6, 1e9)
            if not all(_is_within(value, limit * s.count) for value, limit in zip(sums, limits, strict=True)):
                return "BAD_SCORES"
    return None


def length(arrays: Mapping[str, np.ndarray]) -> float:
    """L2 norm over all arrays, in any order; NaN or infinite if any value is, or if float32 cannot hold its square."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(math.fsum(float(np.square(value).sum(dtype=np.float64)) for value in arrays.values()))


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
        sums = (s.input_sum, s.change_sum, s.loss_sum, s.loss_square_sum, s.gradient_sum)
        limits = (s.count, 10.0 * s.count, 10.0 * s.count, 100.0 * s.count, 1e6 * s.count)
        if not all(_is_within(value, limit) and value >= 0 for value, limit in zip(sums, limits, strict=True)):
            return "BAD_STATISTICS"
    return None


def _is_within(value: object, limit: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= limit
