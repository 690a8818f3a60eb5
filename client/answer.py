"""One message, from its bytes to the reply's: the trainer's work, or the ClientApp's where there is no trainer."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path

from client.alone import baseline_round, fine_tune_round
from client.outgoing import refusal
from client.site import load_site
from client.wire import Parcel
from client.work import Action, describe, evaluate_round, handle, refuse, train_round
from tat_core.blobs import by_owner, pack, unpack
from tat_core.code import code_hash
from tat_core.config import load_config
from tat_core.packet import Packet

log = logging.getLogger("fed_tat.site")

ACTIONS: dict[str, Action] = {
    "query": describe,
    "train": train_round,
    "train.baseline": baseline_round,
    "train.fine_tune": fine_tune_round,
    "evaluate": evaluate_round,
}

_configuration = lru_cache(maxsize=4)(load_config)


def answer(site_file: Path, request: Parcel) -> Parcel:
    """Do what an instruction asks for; whatever goes wrong leaves the site as a code.

    Parameters
    ----------
    site_file : Path
        The hospital's ``site.yaml``, read anew for each message.
    request : Parcel
        ``kind``, ``preset``, ``overrides`` and the coordinator's ``config``; the model.
    """
    started = time.perf_counter()
    header = request.header
    action = ACTIONS[header["kind"]]
    try:
        site = load_site(site_file)
        log_to(site.state_dir / "site.log")
    except (ValueError, OSError):
        # Before the site is known there is no log of its own; standard error stays on the site's machine.
        logging.getLogger("fed_tat").exception("refused before any work")
        return _parcel(refusal("SITE_CONFIGURATION"))
    stated = header["config"].get("code")
    if stated != code_hash() and not (site.coordinator and site.coordinator.accept_other_code):
        log.warning("refused: CODE_MISMATCH: the coordinator runs %s, this site %s", str(stated)[:12], code_hash()[:12])
        return _parcel(refuse(site, action, Packet(), "CODE_MISMATCH"))
    try:
        config = _configuration(header["preset"], header["overrides"])
        arrays = {key: value for blob in request.blobs.values() for key, value in unpack(blob).items()}
    except ValueError:
        log.exception("refused before any work")
        return _parcel(refuse(site, action, Packet(), "BAD_INPUT"))
    reply = handle(action, site, config, Packet(arrays, {}, header["config"]))
    log.info("%s: answered in %.3f s", header["kind"], time.perf_counter() - started)
    return _parcel(reply)


def log_to(path: Path) -> None:
    """Send the site's log to its own file, and nowhere else; a simulated process serves several sites in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("fed_tat")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def _parcel(reply: Packet) -> Parcel:
    blobs = {owner: pack(some) for owner, some in by_owner(reply.arrays).items()}
    return Parcel({"config": reply.config, "metrics": reply.metrics}, blobs)
