"""Validation scores: from the sums and counts that sites report to means by task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from tat_core.evaluate import Scores

ARMS = ("input", "restored")


@dataclass(frozen=True)
class Validation:
    """One task's scores over all sites that reported it.

    Attributes
    ----------
    input, restored : Scores
        Of the images as given, and as the model restored them.
    """

    input: Scores
    restored: Scores

    @property
    def gain_db(self) -> float:
        """Mean PSNR of the restored slices minus that of the inputs, in dB."""
        return self.restored.mean()["psnr"] - self.input.mean()["psnr"]

    def means(self) -> dict[str, dict[str, float]]:
        """Means and counts, for the round's record."""
        return {
            arm: {**scores.mean(), "count": scores.count} for arm, scores in (("input", self.input), ("restored", self.restored))
        }


def read_scores(metrics: Mapping[str, int | float], tasks: Collection[str]) -> dict[str, Validation]:
    """One site's scores by task; a task that it did not score is absent."""
    names = [f.name for f in fields(Scores)]
    found: dict[str, Validation] = {}
    for task in tasks:
        keys = [[f"{task}.{arm}.{name}" for name in names] for arm in ARMS]
        if all(key in metrics for arm in keys for key in arm):
            found[task] = Validation(*(Scores(*(metrics[key] for key in arm)) for arm in keys))  # type: ignore[arg-type]
    return found


def pool_scores(metrics: Mapping[str, Mapping[str, int | float]], tasks: Collection[str]) -> dict[str, Validation]:
    """Add up the sites' scores, in the order of site names; tasks that nobody scored are absent."""
    pooled: dict[str, Validation] = {}
    for site in sorted(metrics):
        for task, scores in read_scores(metrics[site], tasks).items():
            before = pooled.get(task, Validation(Scores(), Scores()))
            pooled[task] = Validation(before.input + scores.input, before.restored + scores.restored)
    return {task: pooled[task] for task in tasks if task in pooled}


def mean_gain_db(validation: Mapping[str, Validation]) -> float | None:
    """Mean over tasks of the gain over the input, in dB; None if nothing was scored."""
    if not validation:
        return None
    return sum(v.gain_db for v in validation.values()) / len(validation)


def gain_by_site(metrics: Mapping[str, Mapping[str, int | float]], tasks: Collection[str]) -> dict[str, float]:
    """Each site's own mean gain over its tasks, in dB: the worst of them is what a mean over sites hides."""
    gains = {site: mean_gain_db(pool_scores({site: metrics[site]}, tasks)) for site in sorted(metrics)}
    return {site: gain for site, gain in gains.items() if gain is not None}
