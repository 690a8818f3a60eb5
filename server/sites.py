"""The hospitals as the engine sees them, however they are reached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    says : dict of str to str
        Its versions, and whatever else its version of fed-tat says of a site: short texts for the record.
    """

    tasks: tuple[str, ...]
    patients: str
    says: Mapping[str, str] = field(default_factory=dict)


_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it becomes the name of a file
_MAX_SAID, _MAX_CHARACTERS = 16, 64


def read_introduction(reply: Packet, config: RunConfig) -> tuple[str, SiteInfo]:
    """A site's name and what it says of itself, from its reply to a query.

    Raises
    ------
    ValueError
        With nothing but a code: what the site sent as ``error``, ``WRONG_NAME`` or ``NO_SHARED_TASK``.
    """
    if reply.error is not None:
        raise ValueError(reply.error)
    said = {key: str(value)[:_MAX_CHARACTERS] for key, value in reply.config.items()}
    name, offered, patients = said.pop("site", ""), said.pop("tasks", "").split(","), said.pop("patients", "")
    tasks = tuple(task for task in config.tasks if task in offered)
    if not _NAME.fullmatch(name):
        raise ValueError("WRONG_NAME")
    if not tasks:
        raise ValueError("NO_SHARED_TASK")
    return name, SiteInfo(tasks, patients, dict(sorted(said.items())[:_MAX_SAID]))


class Sites(Protocol):
    """The hospitals."""

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        """The sites that can be asked now, by name; called before every round, since sites come and go."""

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        """Send each named site its instruction ("train" or "evaluate") and yield the replies as they arrive.

        None is yielded while there is no news, so that the caller can look at the clock; it may stop listening at any time.
        """
