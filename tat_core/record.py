"""Read what a run left on disk: also of a run that is still going, died, or was killed in the middle of a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

RECORD_FILES = ("rounds.jsonl", "summary.json", "config.yaml")
MIN_QUIET_S = 120.0


@dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    Attributes
    ----------
    folder : pathlib.Path
    rounds : list of dict
        One entry a round, in order; when a round was repeated, its last line.
    summary : dict or None
        None until the run has finished.
    config : dict
        Empty if it cannot be read.
    notes : list of str
        What could not be read, in plain words.
    """

    folder: Path
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, as it calls itself or else as its folder is called."""
        return str((self.summary or {}).get("name") or self.folder.resolve().name)

    @property
    def num_rounds(self) -> int:
        """How many rounds were planned; 0 if the record does not say."""
        planned = self.rounds[-1].get("num_rounds") if self.rounds else self.config.get("num_rounds")
        return int(planned or 0)

    @property
    def sites(self) -> list[str]:
        """Every site that any round or the summary names, sorted."""
        named = {site for line in self.rounds for site in line.get("sites", {})}
        return sorted(named | set((self.summary or {}).get("hospitals", {})))

    @property
    def tasks(self) -> list[str]:
        """Every task that any round or the summary names, sorted."""
        named = {task for line in self.rounds for task in line.get("tasks", {})}
        return sorted(named | set((self.summary or {}).get("tasks", {})))


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises
    ------
    ValueError
        If nothing in it says that it is a run.
    """
    if not is_run(folder):
        raise ValueError(
            f"read a run: expected a folder with rounds.jsonl, summary.json or config.yaml, got {folder}; "
            "give the folder of one run, such as runs/demo"
        )
    notes: list[str] = []
    summary = _read_mapping(folder / "summary.json", json.loads, notes)
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, notes)
    rounds = _read_rounds(folder / "rounds.jsonl", notes)
    return RunRecord(folder, rounds, summary, config or (summary or {}).get("config") or {}, notes)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the record of a run."""
    return any((folder / file).is_file() for file in RECORD_FILES)


def last_sign_of_life(record: RunRecord) -> datetime:
    """When anything of the record was last written, in UTC."""
    files = [record.folder / file for file in RECORD_FILES]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.is_file()), UTC)


def state_of(record: RunRecord, now: datetime) -> str:
    """``finished``, ``running`` or ``silent``.

    A run is silent when it has not finished and has not written for three times its longest round, and for two minutes at least:
    it died, was stopped, or is in a round that takes unusually long.
    """
    if record.summary is not None or (record.rounds and len(record.rounds) >= record.num_rounds):
        return "finished"
    longest_s = max((float(line.get("seconds") or 0) for line in record.rounds), default=0.0)
    quiet_s = (now - last_sign_of_life(record)).total_seconds()
    return "silent" if quiet_s > max(3 * longest_s, MIN_QUIET_S) else "running"


def _read_rounds(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rounds: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            rounds[int(line["round"])] = line
        except (ValueError, TypeError, KeyError):
            unreadable += 1
    if unreadable:
        notes.append(f"{path.name}: {unreadable} line(s) could not be read and were left out")
    return [rounds[number] for number in sorted(rounds)]


def _read_mapping(path: Path, parse: Any, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name}: could not be read and was left out")
        return None
    return content
