"""`site.yaml`: the hospital's own file, which no coordinator can change. What follows from it for a run is `client.consent`'s."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from client.coordinator import Coordinator, read_coordinator
from tat_core.tasks import TASKS

METRICS = ("losses", "scores")


@dataclass(frozen=True)
class PrivacyLimits:
    """What a hospital demands for each of its patients (docs/privacy.md).

    Attributes
    ----------
    required : bool
        Whether a run that trains without differential privacy is refused.
    epsilon : float or None
        Most that all runs together may spend on one data set; None sets no limit, and is for sites that require nothing.
    delta : float
        The δ at which ε is counted; below 1 / number of patients.
    """

    required: bool = False
    epsilon: float | None = None
    delta: float = 1e-5


@dataclass(frozen=True)
class Site:
    """What a hospital offers to a run, and on which terms.

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
        What must outlive a run and a reinstallation: log, audit log, privacy ledger, optimiser's states.
    synthetic : bool
        Whether the images were simulated.
    minimum_patients : int
        A data set with fewer training patients takes no part.
    max_rounds_per_day : int or None
        Training rounds within 24 hours, over all runs.
    metrics : tuple of str
        Which of `METRICS` may leave.
    metric_digits : int
        Significant digits that a loss or score keeps when it leaves.
    privacy : PrivacyLimits
    coordinator : Coordinator or None
        Whom `flower-client` connects to.
    """

    name: str
    data: dict[str, Path]
    state_dir: Path
    scanner: str = ""
    device: str = "cpu"
    synthetic: bool = False
    minimum_patients: int = 11
    max_rounds_per_day: int | None = None
    metrics: tuple[str, ...] = METRICS
    metric_digits: int = 4
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)
    coordinator: Coordinator | None = None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value > 0


def _is_metrics(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item in METRICS for item in value)


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# What each key has to be, in words and as a check. A section is never a value itself: its keys have rules of their own.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": (
        "1 to 64 letters, digits, '-' and '_'",
        lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is not None,
    ),
    "scanner": ("text", lambda value: isinstance(value, str)),
    "device": ("cpu, cuda or cuda:N", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", str(value)) is not None),
    "data": (f"a mapping from {', '.join(TASKS)} to folders", lambda _: False),
    **{f"data.{task}": ("a folder", _is_folder) for task in TASKS},
    "state_dir": ("a folder", _is_folder),
    "synthetic": ("true or false", lambda value: isinstance(value, bool)),
    "minimum_patients": ("a whole number of at least 1", _is_count),
    "max_rounds_per_day": ("a whole number of at least 1, or null", lambda value: value is None or _is_count(value)),
    "metrics": (f"a list of {' and '.join(METRICS)}; [] for none", _is_metrics),
    "metric_digits": ("a whole number from 1 to 8", lambda value: _is_count(value) and value <= 8),
    "coordinator": ("a mapping with superlink: HOST:PORT", lambda value: isinstance(value, dict)),
    "privacy": ("a mapping of required, epsilon and delta to values", lambda _: False),
    "privacy.required": ("true or false", lambda value: isinstance(value, bool)),
    "privacy.epsilon": ("a number above 0, or null", lambda value: value is None or (_is_number(value) and value > 0)),
    "privacy.delta": ("a number above 0 and below 1", lambda value: _is_number(value) and 0 < value < 1),
}
_SECTIONS = ("data", "privacy")


def load_site(path: Path) -> Site:
    """Read and validate a hospital's `site.yaml`; relative paths are relative to that file.

    Raises
    ------
    ValueError
        The file is missing, is not YAML, or a key is unknown, missing, given twice or of the wrong type; the message names
        the line.
    """
    if not path.is_file():
        raise ValueError(
            f"site file: expected a file, got {path}, which does not exist; copy deploy/site.example.yaml and fill it in"
        )
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value, line in _read(path):
        if key not in _RULES:
            near = difflib.get_close_matches(key, _RULES, n=1)
            hint = f"did you mean {near[0]}?" if near else "deploy/site.example.yaml shows all of them"
            raise _wrong(path, line, key, "a known key", "another", hint)
        if key in values:
            raise _wrong(path, line, key, "each key once", f"it again after line {lines[key]}", "remove one of them")
        if key.startswith("privacy."):
            value = _as_number(value)
        expected, holds = _RULES[key]
        if not holds(value):
            raise _wrong(path, line, key, expected, repr(value))
        values[key], lines[key] = value, line
    data = _section(values, "data")
    if "name" not in values or not data:
        raise _wrong(path, 1, "data" if "name" in values else "name", "it to be given", "nothing", "add it")
    if values.get("privacy.required") and values.get("privacy.epsilon") is None:
        raise _wrong(path, lines["privacy.required"], "privacy.required", "privacy.epsilon beside it", "none", "add it")
    plain = {key: value for key, value in values.items() if "." not in key}
    return Site(
        **plain
        | {
            "data": {task: (path.parent / folder).resolve() for task, folder in sorted(data.items())},
            "state_dir": (path.parent / values.get("state_dir", "state")).resolve(),
            "metrics": tuple(values.get("metrics", METRICS)),
            "privacy": PrivacyLimits(**_section(values, "privacy")),
            "coordinator": read_coordinator(path, values["coordinator"]) if "coordinator" in values else None,
        }
    )


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def _read(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Every key of the file (those of a section as ``section.key``), its value, and its line."""
    try:
        loader = yaml.SafeLoader(path.read_text("utf-8"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise _wrong(path, 1, "file", "a mapping of keys to values", "something else")
        for key_node, node in root.value:
            is_section = key_node.value in _SECTIONS and isinstance(node, yaml.MappingNode)
            prefix = f"{key_node.value}." if is_section else ""
            for inner_node, value_node in node.value if is_section else [(key_node, node)]:
                key, line = f"{prefix}{inner_node.value}", inner_node.start_mark.line + 1
                try:
                    value = loader.construct_object(value_node, deep=True)
                except ValueError as error:  # such as the 99th of a month
                    raise _wrong(path, line, key, "a value that YAML can read", str(error)) from None
                yield key, value, line
    except UnicodeDecodeError:
        raise _wrong(path, 1, "file", "UTF-8 text", "other bytes", "save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise _wrong(path, mark.line + 1 if mark else 1, "file", "YAML", f"a syntax error: {problem}") from None


def _as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5, without a dot, as a word."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE][-+]?\d+", value) else value


def _wrong(path: Path, line: int, key: str, expected: str, got: str, do: str = "correct it") -> ValueError:
    return ValueError(f"site file {path}, line {line}, {key}: expected {expected}, got {got}; {do}")
