"""Between tasks: from the mean update of each task to the step that the model takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def aggregation_weights(tasks: list[str]) -> dict[str, float]:
    """Share of each reported task in the combined step: equal, summing to 1.

    With Adam at the sites every task's update has about the same length whatever its loss, so equal shares are already close to
    what the balancer aims at (DESIGN: the balancer).
    """
    return {task: 1.0 / len(tasks) for task in tasks}


def combine(means: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum of the tasks' mean updates of one parameter."""
    tasks = sorted(means)
    step = means[tasks[0]] * np.float32(weights[tasks[0]])
    for task in tasks[1:]:
        step += means[task] * np.float32(weights[task])
    return step


@dataclass
class Geometry:
    """Inner products of the tasks' updates, summed up parameter by parameter, for the round's record."""

    products: dict[tuple[str, str], float] = field(default_factory=dict)
    step_square: float = 0.0

    def add(self, means: Mapping[str, np.ndarray], step: np.ndarray) -> None:
        """Count one parameter in."""
        tasks = sorted(means)
        for i, a in enumerate(tasks):
            for b in tasks[i:]:
                product = float((means[a] * means[b]).sum(dtype=np.float64))
                self.products[a, b] = self.products.get((a, b), 0.0) + product
        self.step_square += float(np.square(step).sum(dtype=np.float64))

    def cosines(self) -> dict[str, float]:
        """Cosine between every two tasks' updates, keyed ``"CT-MRI"``; 0 where an update is zero."""
        return {
            f"{a}-{b}": product / math.sqrt(self.products[a, a] * self.products[b, b])
            if self.products[a, a] * self.products[b, b]
            else 0.0
            for (a, b), product in self.products.items()
            if a != b
        }

    def norms(self) -> dict[str, float]:
        """Length of each task's mean update."""
        return {a: math.sqrt(product) for (a, b), product in self.products.items() if a == b}

    @property
    def step_norm(self) -> float:
        """Length of the combined step."""
        return math.sqrt(self.step_square)
