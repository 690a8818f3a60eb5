"""Scores of a model as files: one CSV row and one JSON entry for each slice, case, patient, data set and task."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tat_core.checkpoint import replacing
from tat_core.config import EvaluateConfig
from tat_core.evaluate import Scores, SliceScores
from tat_core.metrics import DATA_RANGE
from tat_core.tasks import TASKS

if TYPE_CHECKING:
    from tat_core.data.prepared import PreparedSplit

ARMS = ("input", "restored")
# What each level is grouped by; a coarser level is a mean over the slices in it, as in the benchmark.
LEVELS = {
    "task": ("task",),
    "data_set": ("task", "data_set"),
    "patient": ("task", "data_set", "patient"),
    "case": ("task", "data_set", "patient", "case"),
}
_SSIM = "Gaussian 11x11, sigma 1.5, K .01 and .03, zero padding, mean over all pixels"


@dataclass(frozen=True)
class SliceRow:
    """One slice and where it comes from; ``slice`` counts from 0 within its case."""

    task: str
    data_set: str
    patient: str
    case: str
    slice: int
    scores: SliceScores


def find_data_sets(folders: Sequence[Path]) -> dict[str, Path]:
    """Data sets in the given folders, by a short name: the folders themselves, or what lies one or two levels below.

    The name is the end of the path, as much of it as sets the data set apart. A folder given twice is one data set.

    Raises
    ------
    ValueError
        If a folder holds none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        levels = (sorted(folder.glob(f"{below}dataset.json")) for below in ("", "*/", "*/*/"))
        files = next((files for files in levels if files), [])
        if not files:
            raise ValueError(
                f"evaluate: expected a data set (a folder with dataset.json) in {folder}, got none; see docs/dataset.md"
            )
        for file in files:
            found.setdefault(file.parent.resolve(), file.parent)
    return {_short_name(place, found): path for place, path in found.items()}


def _short_name(place: Path, all_places: Iterable[Path]) -> str:
    """Hospital and task, and what is above them where others end alike."""
    others = [other for other in all_places if other != place]
    depth = 2
    while any(other.parts[-depth:] == place.parts[-depth:] for other in others):
        depth += 1
    return Path(*place.parts[-depth:]).as_posix()


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises
    ------
    ValueError
        If this computer does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected one of this computer, got {name!r}; try --device cpu") from None
    return device


def label_slices(scores: Iterable[SliceScores], split: PreparedSplit, data_set: str) -> Iterator[SliceRow]:
    """Add to each slice's scores the case, the patient and the number that it has in its case."""
    seen: Counter[str] = Counter()
    for scored in scores:
        case = split.case(scored.index)
        yield SliceRow(split.task.name, data_set, split.patient(scored.index), case, seen[case], scored)
        seen[case] += 1


def evaluation_of(rows: Sequence[SliceRow], model: Mapping[str, Any], split: str, config: EvaluateConfig) -> dict[str, Any]:
    """Everything that an evaluation found, ready for JSON.

    Parameters
    ----------
    rows : sequence of SliceRow
        Of any number of data sets and tasks.
    model : mapping
        ``file`` and ``sha256``.
    split : str
    config : EvaluateConfig
        Tile size and overlap that were used.

    Returns
    -------
    dict
        ``model``, ``split``, ``tiles``, ``definition``, ``tasks`` by name, and lists: ``data_sets``, ``patients``, ``cases``,
        ``slices``.

    Raises
    ------
    ValueError
        If there is no slice.
    """
    if not rows:
        raise ValueError(f"evaluate: expected slices in the {split} split, got none; choose another --split")
    tasks = {}
    for entry in _grouped(rows, LEVELS["task"]):
        task = TASKS[entry["task"]]
        tasks[task.name] = {
            "unit": task.unit,
            "evaluation_window": list(task.evaluation_window),
            "data_range": DATA_RANGE,
            "patients": len({(row.data_set, row.patient) for row in rows if row.task == task.name}),
            **{key: value for key, value in entry.items() if key != "task"},
        }
    return {
        "model": dict(model),
        "split": split,
        "tiles": {"tile_size": config.tile_size, "tile_overlap": config.tile_overlap},
        "definition": {"ssim": _SSIM, "data_range": DATA_RANGE, "mean": "over slices"},
        "tasks": tasks,
        **{f"{level}s": _grouped(rows, keys) for level, keys in LEVELS.items() if level != "task"},
        "slices": [_slice_entry(row) for row in rows],
    }


def write_evaluation(evaluation: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write evaluation.csv and evaluation.json, each of them atomically; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"evaluation.csv": _csv(evaluation), "evaluation.json": json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n"}
    for name, text in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in files]


def _grouped(rows: Sequence[SliceRow], keys: Sequence[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[SliceRow]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, group, strict=True)),
            "slices": sum(bool(row.scores.arms) for row in members),
            "not_scored": sum(not row.scores.arms for row in members),
            **_means([row.scores for row in members]),
        }
        for group, members in groups.items()
    ]


def _slice_entry(row: SliceRow) -> dict[str, Any]:
    place = {key: value for key, value in asdict(row).items() if key != "scores"}
    return {**place, "data_range": row.scores.data_range, **_means([row.scores])}


def _means(slices: Sequence[SliceScores]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for arm in ARMS:
        total = sum((scored.arms[arm] for scored in slices if arm in scored.arms), Scores())
        means = total.mean() if total.count else None
        entry[arm] = means and {metric: means[metric] for metric in ("psnr", "ssim", "rmse")}
    both = entry["input"] and entry["restored"]
    entry["gain_db"] = entry["restored"]["psnr"] - entry["input"]["psnr"] if both else None
    return entry


def _csv(evaluation: Mapping[str, Any]) -> str:
    entries = [("task", {"task": name, **entry}) for name, entry in evaluation["tasks"].items()]
    entries += [(level, entry) for level in (*LEVELS, "slice") if level != "task" for entry in evaluation[f"{level}s"]]
    buffer = io.StringIO()
    place = ("task", "data_set", "patient", "case", "slice")
    scores = [f"{arm}_{metric}" for arm in ARMS for metric in ("psnr_db", "ssim", "rmse")]
    header = ["level", *place, "slices", *scores, "gain_db", "unit", "window_low", "window_high", "data_range"]
    table = csv.writer(buffer)
    table.writerow(header)
    for level, entry in entries:
        task = TASKS[entry["task"]]
        values = [(entry[arm] or {}).get(metric) for arm in ARMS for metric in ("psnr", "ssim", "rmse")]
        slices = entry.get("slices", int(entry["input"] is not None))
        span = entry.get("data_range") if level == "slice" else "per slice"
        table.writerow(
            [
                level,
                *(entry.get(key) for key in place),
                slices,
                *values,
                entry["gain_db"],
                task.unit,
                *task.evaluation_window,
                span,
            ]
        )
    return buffer.getvalue()
