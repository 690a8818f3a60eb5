"""Paired differences between two arms and their bootstrap intervals. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000

Values = Mapping[int, Mapping[str, np.ndarray]]
"""Seed → site → one value per test slice."""


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % bootstrap interval round it."""

    mean: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} … {self.high:+.2f})"


def difference(a: Values, b: Values) -> dict[int, dict[str, np.ndarray]]:
    """``a − b`` slice by slice, for the seeds that both have."""
    return {seed: {site: a[seed][site] - b[seed][site] for site in a[seed]} for seed in sorted(set(a) & set(b))}


def paired_interval(values: Values, task_of: Mapping[str, str], rng: np.random.Generator) -> Interval:
    """Mean over seeds, tasks, the sites of a task and a site's slices, in this order of nesting, with its interval.

    Each resample draws seeds, and within every site slices, with replacement. The slices of a site are one patient's here, and
    resemble each other: the interval tells how sure the difference is for these patients, not for others.

    Parameters
    ----------
    values : mapping of seed to (site to values)
    task_of : mapping of site to task
        Sites that are absent are left out.
    rng : numpy.random.Generator
    """
    seeds = sorted(values)
    sites = sorted(site for site in values[seeds[0]] if site in task_of)
    tasks = sorted({task_of[site] for site in sites})
    weight = np.array([1 / len(tasks) / sum(task_of[other] == task_of[site] for other in sites) for site in sites])
    by_site = {site: np.stack([values[seed][site] for seed in seeds]) for site in sites}  # (seeds, slices)
    mean = float(weight @ np.array([by_site[site].mean() for site in sites]))
    drawn = np.empty((RESAMPLES, len(sites)))
    chosen_seeds = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    for column, site in enumerate(sites):
        slices = by_site[site].shape[1]
        chosen = rng.integers(slices, size=(RESAMPLES, slices))
        drawn[:, column] = by_site[site][chosen_seeds[:, :, None], chosen[:, None, :]].mean((1, 2))
    low, high = np.quantile(drawn @ weight, (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def gap_closed(ours: float, alone: float, pooled: float, smallest: float = 0.1) -> float | None:
    """(F − L)/(P − L): 0 is alone, 1 is pooled; None where P − L is below `smallest` dB and dividing by it says nothing."""
    return (ours - alone) / (pooled - alone) if pooled - alone >= smallest else None
