"""The hospitals as the engine sees them, however they are reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tat_core.config import RunConfig
from tat_core.packet import Packet


@dataclass(frozen=True)
class SiteInfo:
    """What a site said of itself when it was asked.

    Attributes
    ----------
    tasks : tuple of str
        Those of the run's tasks that it has data for.
    patients : str
        How many patients, as a range.
    """

    tasks: tuple[str, ...]
    patients: str


class Sites(Protocol):
    """The hospitals."""

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites that can be asked now, by name; called before every round, since sites come and go."""

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        """Send each named site its instruction ("train" or "evaluate") and yield the replies as they arrive.

        None is yielded while there is no news, so that the caller can look at the clock; it may stop listening at any time.
        """
