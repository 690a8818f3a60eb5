"""Between tasks: from the mean update of each task to the step that the model takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from scipy.optimize import minimize

_BLOCK = 8192


def combine(means: Mapping[str, np.ndarray], shares: Mapping[str, float]) -> np.ndarray:
    """Weighted sum of the tasks' mean updates of one parameter."""
    tasks = sorted(means)
    step = means[tasks[0]] * np.float32(shares[tasks[0]])
    for task in tasks[1:]:
        step += means[task] * np.float32(shares[task])
    return step


def conflict_averse(gram: np.ndarray, shares: np.ndarray, aversion: float) -> np.ndarray:
    """Shares of the step that most helps the task it helps least, near the weighted mean of the updates.

    CAGrad (Liu et al., arXiv:2110.14048): with g₀ = Σ share_t·Δ_t and c = `aversion`, d = g₀ + c·‖g₀‖·g_w/‖g_w‖ where g_w is the
    convex combination of the updates that minimises ⟨g_w, g₀⟩ + c·‖g₀‖·‖g_w‖. The length is brought back to ‖g₀‖: turning is
    what is wanted, not a longer step. All of it follows from the inner products.

    Parameters
    ----------
    gram : np.ndarray (T, T)
        Inner products of the T tasks' updates.
    shares : np.ndarray (T,)
        Of the weighted mean; sum to 1.
    aversion : float
        In [0, 1); 0 gives `shares` back.

    Returns
    -------
    np.ndarray (T,)
        Coefficients of the updates; they need not sum to 1.
    """
    length = math.sqrt(max(float(shares @ gram @ shares), 0.0))
    if length == 0.0 or aversion == 0.0:
        return shares
    scaled = gram / length**2  # the solver's tolerances are absolute

    def objective(w: np.ndarray) -> float:
        return float(w @ scaled @ shares + aversion * math.sqrt(max(float(w @ scaled @ w), 1e-16)))

    def slope(w: np.ndarray) -> np.ndarray:
        return scaled @ shares + aversion * (scaled @ w) / math.sqrt(max(float(w @ scaled @ w), 1e-16))

    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": np.ones_like}
    found = minimize(objective, shares, jac=slope, bounds=[(0.0, 1.0)] * len(shares), constraints=sums_to_one, method="SLSQP")
    worst = math.sqrt(max(float(found.x @ scaled @ found.x), 1e-16))
    turned = shares + aversion * found.x / worst
    return turned / math.sqrt(max(float(turned @ scaled @ turned), 1e-16))


class Gram:
    """Inner products of the tasks' updates, added up parameter by parameter.

    Parameters
    ----------
    tasks : iterable of str
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks = sorted(tasks)
        self.products = np.zeros((len(self.tasks), len(self.tasks)))

    def add(self, means: Mapping[str, np.ndarray]) -> None:
        """Count one parameter in."""
        for i, a in enumerate(self.tasks):
            for j, b in enumerate(self.tasks[i:], i):
                self.products[i, j] = self.products[j, i] = self.products[i, j] + _inner(means[a], means[b])

    def add_own(self, task: str, update: np.ndarray) -> None:
        """Count in a parameter that a task has of its own."""
        place = self.tasks.index(task)
        self.products[place, place] += _inner(update, update)

    def __add__(self, other: Gram) -> Gram:
        total = Gram(self.tasks)
        total.products = self.products + other.products
        return total

    def cosines(self) -> dict[str, float]:
        """Cosine between every two tasks' updates, keyed ``"CT-MRI"``; 0 where an update is zero."""
        norms = self.norms()
        return {
            f"{a}-{b}": float(self.products[i, j]) / (norms[a] * norms[b]) if norms[a] * norms[b] else 0.0
            for i, a in enumerate(self.tasks)
            for j, b in enumerate(self.tasks)
            if i < j
        }

    def norms(self) -> dict[str, float]:
        """Length of each task's mean update."""
        return {task: math.sqrt(self.products[i, i]) for i, task in enumerate(self.tasks)}

    def length(self, shares: Mapping[str, float]) -> float:
        """Length of the weighted sum of the updates."""
        weights = np.array([shares[task] for task in self.tasks])
        return math.sqrt(max(float(weights @ self.products @ weights), 0.0))


def _inner(a: np.ndarray, b: np.ndarray) -> float:
    """Inner product in blocks: no temporary of the arrays' size, and the same bits whatever the number of threads."""
    a, b = a.reshape(-1), b.reshape(-1)
    whole = len(a) // _BLOCK * _BLOCK
    blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK))
    return float(blocks.sum(dtype=np.float64)) + float(np.einsum("i,i->", a[whole:], b[whole:]))
