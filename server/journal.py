"""A run on disk: its state after each round, its record, and what can be trusted of them after a crash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from server.history import SiteHistory
from server.optimise import Moments
from tat_core.balance import BalanceState
from tat_core.checkpoint import replacing, save_arrays
from tat_core.config import RunConfig, config_from_dict, config_to_dict

log = logging.getLogger("fed_tat.server")

KEPT_STATES = 2
FINISHED = "finished"
AVERAGE, FIRST, SECOND = "average/", "first/", "second/"


@dataclass(frozen=True)
class ServerState:
    """Everything that the next round depends on.

    Attributes
    ----------
    run : str
        32 hexadecimal digits that tell this run from every other, also of its name: sites keep state by it.
    round : int
        The last round completed; 0 before the first.
    model : dict of parameter name to float32 array
    average : dict of parameter name to float32 array
        Exponential moving average of the models: what is scored and released. Empty if ``train.ema_decay`` is 0.
    balance : BalanceState
    moments : dict of parameter name to Moments
        Of the server's optimiser.
    history : dict of site name to SiteHistory
    awaited : dict of site name to dict
        What was sent last round, arrays apart, to the sites that have not replied: a late reply is told and judged by it.
    nonce : str
        Drawn for the next round, which sites repeat in their replies. It is on disk before anybody sees it, so that a resumed
        round takes the replies that it had, and no reply to anything else passes for one of them.
    best_round : int
        The round whose model had the highest mean gain on the validation patients; 0 if none was scored.
    best_gain_db : float
        That gain: mean over tasks of PSNR(restored) − PSNR(input), in dB.
    best_num_tasks : int
        Over how many tasks: gains over fewer tasks are not compared with it.
    """

    run: str
    round: int
    model: dict[str, np.ndarray]
    balance: BalanceState
    average: dict[str, np.ndarray] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    history: dict[str, SiteHistory] = field(default_factory=dict)
    awaited: dict[str, dict[str, Any]] = field(default_factory=dict)
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    best_round: int = 0
    best_gain_db: float = float("-inf")
    best_num_tasks: int = 0

    @property
    def released(self) -> dict[str, np.ndarray]:
        """The parameters that are scored and handed out."""
        return self.average or self.model

    def strikes_of(self, site: str) -> int:
        """Rounds in a row in which a site's reply was refused."""
        return self.history.get(site, SiteHistory()).strikes


def start_run(folder: Path, config: RunConfig) -> None:
    """Make the run's folder and write its configuration.

    Raises
    ------
    ValueError
        The folder holds a run already.
    """
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"start run: expected a new run folder, got {folder}, which holds a run; "
            "choose another name=… or go on with it by resume=true"
        )
    (folder / "journal").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with."""
    return config_from_dict(yaml.safe_load((folder / "config.yaml").read_text()))


def versions() -> dict[str, str]:
    """What a run's bits depend on, at the coordinator."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("fed-tat", "torch", "numpy", "flwr")}}


def save_state(folder: Path, state: ServerState) -> None:
    """Write the state after a round; the manifest, written last, is what makes it valid. Older states beyond two are removed."""
    journal = folder / "journal"
    arrays = journal / f"{state.round:06d}.safetensors"
    save_arrays(arrays, _flat(state))
    manifest = {
        "run": state.run,
        "round": state.round,
        "names": list(state.model),
        "sha256": _file_hash(arrays),
        "balance": asdict(state.balance),
        "versions": versions(),
        "awaited": state.awaited,
        "nonce": state.nonce,
        "history": {name: asdict(history) for name, history in state.history.items()},
        "best_round": state.best_round,
        "best_gain_db": state.best_gain_db if state.best_round else None,
        "best_num_tasks": state.best_num_tasks,
    }
    manifest["seal"] = _seal(manifest)
    with replacing(journal / f"{state.round:06d}.json") as temporary:
        temporary.write_text(json.dumps(manifest))
    for old in sorted(journal.glob("*.json"))[:-KEPT_STATES]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_state(folder: Path) -> ServerState | None:
    """The newest state that verifies; a torn or damaged one is reported and passed over. None if there never was one.

    Raises
    ------
    ValueError
        There are states, and none of them verifies: beginning anew would throw away what the run has done.
    """
    manifests = sorted((folder / "journal").glob("*.json"), reverse=True)
    for path in manifests:
        try:
            manifest = json.loads(path.read_text())
            if manifest.pop("seal") != _seal(manifest):
                raise ValueError("its manifest was changed")
            if _file_hash(path.with_suffix(".safetensors")) != manifest["sha256"]:
                raise ValueError("its arrays do not have the stated sha256")
            arrays = load_file(path.with_suffix(".safetensors"))
            gain = manifest["best_gain_db"]
            if manifest["versions"] != versions():
                log.warning("journal: written by %s, read by %s: bits may differ", manifest["versions"], versions())
            return ServerState(
                manifest["run"],
                manifest["round"],
                {name: arrays[name] for name in manifest["names"]},
                BalanceState(**manifest["balance"]),
                {name: arrays[AVERAGE + name] for name in manifest["names"] if AVERAGE + name in arrays},
                {name: Moments(arrays.get(FIRST + name), arrays.get(SECOND + name)) for name in manifest["names"]},
                {name: _history(fields) for name, fields in manifest["history"].items()},
                manifest["awaited"],
                manifest["nonce"],
                manifest["best_round"],
                float("-inf") if gain is None else gain,
                manifest["best_num_tasks"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("journal: the state %s is damaged (%s); the one before it is tried", path.stem, error)
    if manifests:
        raise ValueError(
            f"resume: expected a state of {folder.name} that verifies, got {len(manifests)} damaged; "
            "restore its journal folder from a backup, or start anew under another name=…"
        )
    return None


def readmit(folder: Path, state: ServerState) -> ServerState:
    """Forget the strikes of the sites that an operator let back with `tat run readmit`.

    A request is removed only once its outcome is on disk: after a kill in between it is granted again, which changes nothing.
    """
    requests = sorted((folder / "readmit").glob("*"))
    if not requests:
        return state
    back = {request.name: replace(state.history.get(request.name, SiteHistory()), strikes=0) for request in requests}
    state = replace(state, history={**state.history, **back})
    save_state(folder, state)
    for request in requests:
        request.unlink(missing_ok=True)
        log.info("readmitted: %s", request.name)
    return state


def finish(folder: Path, state: ServerState) -> None:
    """Mark the run as finished, when all else that it leaves behind is on disk."""
    with replacing(folder / FINISHED) as temporary:
        temporary.write_text(f"{state.round}\n")


def finished_rounds(folder: Path) -> int:
    """How many rounds a run had when it finished; 0 if it has not."""
    path = folder / FINISHED
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return int(text) if text.isdecimal() else 0


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files of a coordinator that was killed; nothing ever reads them."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Add one round's line to rounds.jsonl, durably."""
    with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewind_record(folder: Path, last_round: int) -> None:
    """Drop the lines of rounds after `last_round`, whose state did not survive, and what is not a line of ours."""
    path = folder / "rounds.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["round"] <= last_round:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            log.warning("record: a line of rounds.jsonl is damaged and left out")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def spool_folder(folder: Path, round_number: int) -> Path:
    """Where a round's replies are kept until it is closed."""
    path = folder / "spool" / f"{round_number:06d}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def clear_spool(folder: Path, last_round: int) -> None:
    """Remove the replies of rounds whose state is journalled."""
    for path in (folder / "spool").glob("*"):
        if int(path.name) <= last_round:
            shutil.rmtree(path)


def _flat(state: ServerState) -> dict[str, np.ndarray]:
    """All arrays of a state under names of their own."""
    flat = {**state.model, **{AVERAGE + name: value for name, value in state.average.items()}}
    for name, moments in state.moments.items():
        flat |= {FIRST + name: moments.first} if moments.first is not None else {}
        flat |= {SECOND + name: moments.second} if moments.second is not None else {}
    return flat


def _history(fields: dict[str, Any]) -> SiteHistory:
    norms, seconds, step_seconds = (tuple(fields[name]) for name in ("norms", "seconds", "step_seconds"))
    unheard = fields.get("unheard", 0)  # states of an older version have none
    return SiteHistory(norms, seconds, step_seconds, fields["strikes"], unheard)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
