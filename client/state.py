"""What a site keeps on its own disk: the optimiser's state between rounds, the last private reply of a run, a pause."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open

from client.site import Site
from tat_core.checkpoint import replacing, save_arrays
from tat_core.packet import Packet

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


def keep_reply(site: Site, run: str, release: str, reply: Packet) -> Packet:
    """Put a private reply on disk before it leaves, and return the one to send.

    Its noise cannot be drawn again, and drawing other noise for the same round would be a second release for one charge. So a
    repeated round sends the same bytes, and where two processes answer the same message the first one on disk is sent by both.
    Only the last reply of a run is kept.
    """
    path = _reply_file(site, run, release)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f".{release}.{os.getpid()}.tmp")
    try:
        save_arrays(mine, reply.arrays, {"metrics": json.dumps(reply.metrics), "config": json.dumps(reply.config)})
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
    finally:
        mine.unlink(missing_ok=True)
    for other in path.parent.glob("*.safetensors"):
        if other != path:
            other.unlink(missing_ok=True)
    return load_reply(site, run, release) or reply


def load_reply(site: Site, run: str, release: str) -> Packet | None:
    """The reply that was kept for this release."""
    path = _reply_file(site, run, release)
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return Packet(arrays, json.loads(metadata["metrics"]), json.loads(metadata["config"]))


def pause_file(site: Site) -> Path:
    """Takes the site out of everything as long as it exists (`tat site pause`)."""
    return site.state_dir / "PAUSED"


def _reply_file(site: Site, run: str, release: str) -> Path:
    return _run_folder(site, run) / f"{release}.safetensors"


def _file(site: Site, run: str, round_number: int) -> Path:
    return _run_folder(site, run) / f"{round_number:06d}.pt"


def _run_folder(site: Site, run: str) -> Path:
    if not _RUN.fullmatch(run):
        raise ValueError("site state: expected a run's identity of 32 hexadecimal digits, got another; update the coordinator")
    return site.state_dir / "runs" / run
