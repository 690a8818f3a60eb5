"""The data set on disk: dataset.json, splits.json, LQ/ and HQ/ with cases of the same name. Described in docs/dataset.md."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tat_core.data.volume import NIFTI_SUFFIXES
from tat_core.tasks import TASKS, Task

FORMAT = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Case:
    """One LQ/HQ pair of volumes.

    Attributes
    ----------
    name : str
        Name of the files or folders, without suffix.
    patient : str
        Site-internal pseudonym; never leaves the site.
    split : str
        ``"train"``, ``"validation"``, ``"test"`` or empty (not used).
    lq, hq : pathlib.Path or None
        File or DICOM folder, None where missing.
    """

    name: str
    patient: str
    split: str
    lq: Path | None
    hq: Path | None


@dataclass(frozen=True)
class DataSet:
    """A data set of one task at one site.

    Attributes
    ----------
    folder : pathlib.Path
    task : Task
    about : dict
        The content of dataset.json.
    cases : tuple[Case, ...]
        Sorted by name; those listed in splits.json and those only found on disk.
    quarantine : dict[str, str]
        Case name to the reason why it is left out.
    """

    folder: Path
    task: Task
    about: dict[str, Any]
    cases: tuple[Case, ...]
    quarantine: dict[str, str] = field(default_factory=dict)


def open_data_set(folder: Path) -> DataSet:
    """Read what a data set states about itself; opens no image.

    Raises
    ------
    ValueError
        If dataset.json or splits.json is missing or wrong.
    """
    about = read_json(folder / "dataset.json", "open_data_set")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"open_data_set: expected format {FORMAT} in dataset.json, got {about.get('format')!r}; see docs/dataset.md"
        )
    if not isinstance(about.get("task"), str) or about["task"] not in TASKS:
        raise ValueError(
            f"open_data_set: expected task {' or '.join(TASKS)} in dataset.json, got {about.get('task')!r}; correct it"
        )
    task = TASKS[about["task"]]
    if about.get("unit") != task.unit:
        raise ValueError(
            f"open_data_set: expected unit {task.unit} for {task.name}, got {about.get('unit')!r}; convert the images"
        )
    if not isinstance(about.get("low_quality", {}), dict):
        raise ValueError("open_data_set: expected an object as low_quality in dataset.json, got another; see docs/dataset.md")
    listed = read_json(folder / "splits.json", "open_data_set").get("cases")
    if not isinstance(listed, dict):
        raise ValueError("open_data_set: expected cases in splits.json, got none; see docs/dataset.md")
    sides = {side: find_cases(folder / side) for side in ("LQ", "HQ")}
    cases = []
    for name in sorted({*listed, *sides["LQ"], *sides["HQ"]}):
        entry = listed.get(name, {})
        split, patient = (entry.get("split", ""), entry.get("patient", "")) if isinstance(entry, dict) else (None, "")
        if split not in (*SPLITS, ""):
            raise ValueError(
                f"open_data_set: expected split {', '.join(SPLITS)} or empty in splits.json, got {split!r}; correct it"
            )
        cases.append(Case(name, str(patient), split, sides["LQ"].get(name), sides["HQ"].get(name)))
    quarantine_file = folder / "quarantine.json"
    quarantine = read_json(quarantine_file, "open_data_set").get("cases", {}) if quarantine_file.exists() else {}
    if not isinstance(quarantine, dict):
        raise ValueError("open_data_set: expected cases in quarantine.json, got none; delete it and run tat data check")
    return DataSet(folder, task, about, tuple(cases), {str(name): str(reason) for name, reason in quarantine.items()})


def find_cases(side: Path) -> dict[str, Path]:
    """Cases below LQ/ or HQ/: NIfTI files and DICOM folders, by name without suffix."""
    found: dict[str, Path] = {}
    if not side.is_dir():
        return found
    for entry in sorted(side.iterdir()):
        if entry.name.startswith("."):
            continue
        suffix = next((s for s in sorted(NIFTI_SUFFIXES, key=len, reverse=True) if entry.name.lower().endswith(s)), None)
        if suffix is not None:
            found[entry.name[: -len(suffix)]] = entry
        elif entry.is_dir():
            found[entry.name] = entry
    return found


def read_json(path: Path, operation: str) -> dict[str, Any]:
    """Read a JSON object; ValueError names the operation and the file's last name only."""
    try:
        if path.stat().st_size > 64 * 2**20:
            raise ValueError(f"{operation}: expected a small {path.name}, got over 64 MiB; correct it")
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{operation}: expected {path.name}, got no such file; see docs/dataset.md") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{operation}: expected {path.name} to be JSON, got {type(error).__name__}; correct it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{operation}: expected an object in {path.name}, got {type(content).__name__}; correct it")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; after a crash the file is the old or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(as_json(content), "utf-8")
    os.replace(temporary, path)


def as_json(content: dict[str, Any]) -> str:
    """How every JSON file here is written; names that are not valid Unicode keep their bytes."""
    return json.dumps(content, indent=2) + "\n"
