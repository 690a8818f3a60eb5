"""What a check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes
    ----------
    check : str
        What was looked at.
    level : str
        ``passed``, ``warning`` (works, but not for long or not well) or ``failed`` (keeps the site from taking part).
    text : str
        What was seen and, unless it passed, what to do.
    """

    check: str
    level: Literal["passed", "warning", "failed"]
    text: str

    def __str__(self) -> str:
        return f"{self.level.upper():8}{self.check}: {self.text}"


def passed(check: str, text: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(check, "passed", text)


def warning(check: str, text: str) -> Finding:
    """A finding that should be looked at."""
    return Finding(check, "warning", text)


def failed(check: str, text: str) -> Finding:
    """A finding that keeps the site from taking part."""
    return Finding(check, "failed", text)
