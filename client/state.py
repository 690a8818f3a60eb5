"""What a site keeps on its own disk between the rounds of a run: the state of its optimiser."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from client.site import Site
from tat_core.checkpoint import replacing

log = logging.getLogger("fed_tat.site")

KEPT_ROUNDS = 3
_RUN = re.compile(r"[0-9a-f]{32}")


def load_optimiser(site: Site, run: str, round_number: int, optimiser: torch.optim.Optimizer) -> None:
    """Go on with the optimiser as it was after the round before, if this site took part in it; else leave it fresh.

    Each round's state has a file of its own, so that a round that is asked for again repeats exactly.
    """
    path = _file(site, run, round_number - 1)
    if not path.is_file():
        return
    try:
        optimiser.load_state_dict(torch.load(path, map_location=site.device, weights_only=True))
    except Exception:  # whatever a damaged file makes the unpickler say, a fresh optimiser will do
        log.exception("round %d: the optimiser's state is damaged; going on with a fresh one", round_number)


def save_optimiser(site: Site, run: str, round_number: int, optimiser: torch.optim.Optimizer) -> None:
    """Keep the optimiser's state after a round; states older than three rounds are removed."""
    path = _file(site, run, round_number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(optimiser.state_dict(), temporary)
    for old in path.parent.glob("*.pt"):
        if int(old.stem) <= round_number - KEPT_ROUNDS:
            old.unlink()


def _file(site: Site, run: str, round_number: int) -> Path:
    if not _RUN.fullmatch(run):
        raise ValueError("site state: expected a run's identity of 32 hexadecimal digits, got another; update the coordinator")
    return site.state_dir / "runs" / run / f"{round_number:06d}.pt"
