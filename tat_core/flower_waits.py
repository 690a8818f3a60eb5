"""How long Flower waits for the parts of a message.

A message is announced before its parts are there. Flower's receiver that finds one missing waits a second, then two, up to ten:
whoever looks soonest waits longest, at each of the four handovers between ServerApp and ClientApp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WAITS = {
    "initial_backoff": 0.05,
    "backoff_cap": 1.0,
    "max_tries_per_object": None,  # what bounds it is Flower's two hours
}


def wait_less(*pull_functions: Callable[..., Any]) -> None:
    """Change the defaults of Flower's functions in this process, whoever has imported them already."""
    for function in pull_functions:
        defaults = function.__kwdefaults__ or {}
        assert defaults.keys() >= WAITS.keys(), function
        function.__kwdefaults__ = defaults | WAITS
