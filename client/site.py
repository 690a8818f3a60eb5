"""`site.yaml`: the hospital's own file, which no coordinator can change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from client.coordinator import Coordinator, read_coordinator
from tat_core.tasks import TASKS

KEYS = {"name", "scanner", "device", "data", "state_dir", "synthetic", "coordinator"}


@dataclass(frozen=True)
class Site:
    """What a hospital offers to a run.

    Attributes
    ----------
    name : str
        The only identity of the hospital that leaves it.
    scanner : str
        Free text for the hospital's own reports.
    device : str
        Where to train: ``cpu``, ``cuda``, ``cuda:1``.
    data : dict of task name to Path
        Data-set directories.
    state_dir : Path
        What must outlive a run: logs, ledgers, caches.
    synthetic : bool
        Whether the images were simulated.
    coordinator : Coordinator or None
        Whom `flower-client` connects to.
    """

    name: str
    scanner: str
    device: str
    data: dict[str, Path]
    state_dir: Path
    synthetic: bool
    coordinator: Coordinator | None = None


def load_site(path: Path) -> Site:
    """Read and validate a hospital's `site.yaml`; relative paths are relative to that file.

    Raises
    ------
    ValueError
        The file is missing, is not YAML, or a key is unknown, missing or of the wrong type.
    """
    if not path.is_file():
        raise ValueError(
            f"site file: expected a file, got {path}, which does not exist; copy deploy/site.example.yaml and fill it in"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"site file {path}: expected YAML, got a syntax error: {error}; correct that line") from None
    if not isinstance(content, dict):
        raise _wrong(path, "file", "a mapping of keys to values", content)
    if unknown := sorted(set(content) - KEYS):
        raise ValueError(
            f"site file {path}: expected keys {', '.join(sorted(KEYS))}, got {', '.join(map(str, unknown))}; remove or rename it"
        )
    name = content.get("name")
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise _wrong(path, "name", "letters, digits, '-' and '_'", name)
    data = content.get("data")
    if (
        not isinstance(data, dict)
        or not data
        or not all(task in TASKS and isinstance(folder, str) for task, folder in data.items())
    ):
        raise _wrong(path, "data", f"a mapping from {', '.join(TASKS)} to directories", data)
    for key in ("scanner", "device", "state_dir"):
        if not isinstance(content.get(key, ""), str):
            raise _wrong(path, key, "text", content[key])
    if not isinstance(content.get("synthetic", False), bool):
        raise _wrong(path, "synthetic", "true or false", content["synthetic"])
    return Site(
        name=name,
        scanner=content.get("scanner", ""),
        device=content.get("device", "cpu"),
        data={task: (path.parent / folder).resolve() for task, folder in sorted(data.items())},
        state_dir=(path.parent / content.get("state_dir", "state")).resolve(),
        synthetic=content.get("synthetic", False),
        coordinator=read_coordinator(path, content["coordinator"]) if "coordinator" in content else None,
    )


def _wrong(path: Path, key: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"site file {path}, {key}: expected {expected}, got {got!r}; correct it")
