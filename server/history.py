"""What the coordinator remembers of each site: how long its updates were, how long they took, how often they were unfit. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

KEPT = 10
NEW_ROUNDS = 3  # in which a site that has not trained yet gets the full time


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
    unheard : int
        Rounds since its last good reply that closed without a word of it.
    """

    norms: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    strikes: int = 0
    unheard: int = 0

    @property
    def is_new(self) -> bool:
        """Whether nobody can say yet how long it takes."""
        return not self.seconds and self.unheard < NEW_ROUNDS

    def accepted(self, norm: float, seconds: float, steps: int) -> SiteHistory:
        """After a good reply."""
        return SiteHistory(
            (*self.norms, norm)[-KEPT:], (*self.seconds, seconds)[-KEPT:], (*self.step_seconds, seconds / steps)[-KEPT:], 0
        )

    def refused(self) -> SiteHistory:
        """After a reply that the guard refused."""
        return replace(self, strikes=self.strikes + 1)

    def missed(self) -> SiteHistory:
        """After a round to which it did not reply in time."""
        return replace(self, unheard=self.unheard + 1)


def usual_norm(
    tasks: tuple[str, ...], history: Mapping[str, SiteHistory], tasks_of: Mapping[str, tuple[str, ...]]
) -> float | None:
    """The median length of the last updates of all sites that have one of these tasks; None before there are any."""
    peers = [name for name in sorted(history) if set(tasks_of.get(name, ())) & set(tasks)]
    norms = [norm for name in peers for norm in history[name].norms]
    return statistics.median(norms) if norms else None


def deadline_s(
    history: Mapping[str, SiteHistory],
    members: list[str],
    awaited: list[str],
    factor: float,
    floor_s: float,
    longest_s: float,
) -> float:
    """How long to wait for a round: a multiple of what the slowest member usually takes.

    A member of whom nobody knows how long it takes gets the longest, but only while it may still reply to this round, and only in
    its first rounds: one that always refuses, or is always silent, must not keep all others waiting for whoever else is missing.

    Parameters
    ----------
    history, members
    awaited : list of str
        The members that have not answered yet, neither well nor badly.
    factor : float
        Of the slowest member's median duration.
    floor_s, longest_s : float
        Never less, never more; the longest is also what a round without any history gets.
    """
    usual = [statistics.median(history[name].seconds) for name in members if name in history and history[name].seconds]
    if not usual or any(history.get(name, SiteHistory()).is_new for name in awaited):
        return longest_s
    return min(longest_s, max(floor_s, factor * max(usual)))


def steps_for(site: str, members: list[str], history: Mapping[str, SiteHistory], local_steps: int) -> int:
    """Local steps that a site can take in the time that its median fellow needs for all: a quarter of them at least."""
    rate = {
        name: statistics.median(history[name].step_seconds) for name in members if name in history and history[name].step_seconds
    }
    if site not in rate:
        return local_steps
    affordable = round(local_steps * statistics.median(rate.values()) / rate[site])
    return max(math.ceil(local_steps / 4), min(local_steps, affordable))
