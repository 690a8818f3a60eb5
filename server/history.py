"""What the coordinator remembers of each site: how long its updates were, how long they took, how often they were unfit. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

KEPT = 10


@dataclass(frozen=True)
class SiteHistory:
    """One site's last rounds.

    Attributes
    ----------
    norms : tuple of float
        Lengths of its accepted updates, oldest first, at most ten.
    seconds, step_seconds : tuple of float
        How long it took to reply, in all and divided by its local steps, likewise.
    strikes : int
        Rounds in a row whose reply the guard refused.
    """

    norms: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    strikes: int = 0

    def accepted(self, norm: float, seconds: float, steps: int) -> SiteHistory:
        """After a good reply."""
        return SiteHistory(
            (*self.norms, norm)[-KEPT:], (*self.seconds, seconds)[-KEPT:], (*self.step_seconds, seconds / steps)[-KEPT:], 0
        )

    def refused(self) -> SiteHistory:
        """After a reply that the guard refused."""
        return replace(self, strikes=self.strikes + 1)


def usual_norm(
    tasks: tuple[str, ...], history: Mapping[str, SiteHistory], tasks_of: Mapping[str, tuple[str, ...]]
) -> float | None:
    """The median length of the last updates of all sites that have one of these tasks; None before there are any."""
    peers = [name for name in sorted(history) if set(tasks_of.get(name, ())) & set(tasks)]
    norms = [norm for name in peers for norm in history[name].norms]
    return statistics.median(norms) if norms else None


def deadline_s(history: Mapping[str, SiteHistory], members: list[str], factor: float, floor_s: float, longest_s: float) -> float:
    """How long to wait for a round: a multiple of what the slowest member usually takes.

    Parameters
    ----------
    history, members
    factor : float
        Of the slowest member's median duration.
    floor_s, longest_s : float
        Never less, never more; the longest is also what a round without any history gets.
    """
    usual = [statistics.median(history[name].seconds) for name in members if name in history and history[name].seconds]
    if len(usual) < len(members):  # somebody new: nobody knows how long it takes
        return longest_s
    return min(longest_s, max(floor_s, factor * max(usual, default=longest_s)))


def steps_for(site: str, members: list[str], history: Mapping[str, SiteHistory], local_steps: int) -> int:
    """Local steps that a site can take in the time that its median fellow needs for all: a quarter of them at least."""
    rate = {
        name: statistics.median(history[name].step_seconds) for name in members if name in history and history[name].step_seconds
    }
    if site not in rate:
        return local_steps
    affordable = round(local_steps * statistics.median(rate.values()) / rate[site])
    return max(math.ceil(local_steps / 4), min(local_steps, affordable))
