"""What a site keeps on its own disk: its optimiser's state and parameters that never leave, the last private reply, a pause."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from client.site import Site
from tat_core.checkpoint import replacing, save_arrays
from tat_core.packet import Packet

log = logging.getLogger("fed_tat.site")

KEPT_ROUNDS = 3
KEPT_S = 30 * 86400.0  # an optimiser's state of a run that is over stays for a month
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
    """Keep the optimiser's state after a round; all but the last three, and those of runs long over, are removed.

    Raises
    ------
    OSError
        The disk is full or cannot be written; what was there before still is.
    """
    path = _file(site, run, round_number)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:  # opened by torch it would stay open after a failure
            torch.save(optimiser.state_dict(), file)
    except RuntimeError as error:  # torch's word for it
        raise OSError(f"write {path.name}: expected room and permission, got: {error}; free disk space") from None
    _remove_old(path, round_number)


def load_own(site: Site, run: str, round_number: int) -> dict[str, np.ndarray]:
    """The parameters that never leave the site, as after the last round up to this one that it took part in; empty at first."""
    files = [path for path in _file(site, run, 0).parent.glob("*.safetensors") if int(path.stem) <= round_number]
    for path in sorted(files, reverse=True):
        try:
            return dict(load_file(path))
        except SafetensorError:
            log.exception("the site's own parameters of round %s are damaged; the ones before are tried", path.stem)
    return {}


def save_own(site: Site, run: str, round_number: int, arrays: dict[str, np.ndarray]) -> None:
    """Keep the parameters that never leave the site after a round; all but the last three are removed."""
    path = _file(site, run, round_number).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, arrays)
    _remove_old(path, round_number)


def _remove_old(newest: Path, round_number: int) -> None:
    # Counted by the rounds that the site took part in: after a long absence the last one is old, and a repeated round needs it.
    kept = sorted(path for path in newest.parent.glob(f"*{newest.suffix}") if int(path.stem) <= round_number)
    for old in kept[:-KEPT_ROUNDS]:
        old.unlink()
    for torn in newest.parent.glob(".*.tmp"):  # of a process that was killed; this round's may still be written by another
        if int(torn.name[1:7]) < round_number:
            torn.unlink(missing_ok=True)
    for other in newest.parent.parent.glob("*/*.pt"):
        if time.time() - other.stat().st_mtime > KEPT_S:
            other.unlink(missing_ok=True)


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
    return _run_folder(site, run) / "reply" / f"{release}.safetensors"


def _file(site: Site, run: str, round_number: int) -> Path:
    return _run_folder(site, run) / f"{round_number:06d}.pt"


def _run_folder(site: Site, run: str) -> Path:
    if not _RUN.fullmatch(run):
        raise ValueError("site state: expected a run's identity of 32 hexadecimal digits, got another; update the coordinator")
    return site.state_dir / "runs" / run
