"""The server's optimiser: what the combined update of a round does to the model. Pure.

Reddi et al., Adaptive Federated Optimization (arXiv:2003.00295): the negated update takes the place of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-3


@dataclass(frozen=True)
class Moments:
    """Running moments of one parameter's updates; None where the optimiser keeps none.

    Attributes
    ----------
    first, second : float32 arrays of the parameter's shape, or None
    """

    first: np.ndarray | None = None
    second: np.ndarray | None = None


def advance(kind: str, value: np.ndarray, update: np.ndarray, moments: Moments, lr: float) -> tuple[np.ndarray, Moments]:
    """Take one server step for one parameter.

    Parameters
    ----------
    kind : str
        ``average`` (the model moves by lr · update), ``momentum`` (FedAvgM, β = 0.9) or
        ``adam`` (FedAdam, β = 0.9, 0.99, τ = 1e-3).
    value, update : float32 arrays of one shape
    moments : Moments
        Of the round before; empty at first.
    lr : float
        ``federation.server_lr``.
    """
    if kind == "average":
        return value + np.float32(lr) * update, moments
    if kind == "momentum":
        first = update if moments.first is None else np.float32(BETA1) * moments.first + update
        return value + np.float32(lr) * first, Moments(first)
    assert kind == "adam", f"server optimiser {kind} passed validation"
    first = np.float32(1 - BETA1) * update + (0 if moments.first is None else np.float32(BETA1) * moments.first)
    second = np.float32(1 - BETA2) * np.square(update) + (0 if moments.second is None else np.float32(BETA2) * moments.second)
    return value + np.float32(lr) * first / (np.sqrt(second) + np.float32(EPSILON)), Moments(first, second)
