"""Decoded slices on disk: one memory-mapped array a case, so that training crops without decoding."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from tat_core.data.dataset import SPLITS, Case, DataSet, as_json, open_data_set, read_json, write_json
from tat_core.data.parallel import run_each
from tat_core.data.volume import display_axes, read_volume, to_display
from tat_core.tasks import TASKS, Task

STORE_VERSION = 3
MAX_BAD_FRACTION = 0.05
_JOURNAL = "journal.jsonl"  # what is stored already while prepare is at work


@dataclass(frozen=True)
class StoredCase:
    """A case of a prepared split: `array` is (2, slices, rows, columns) float32, LQ then HQ, in physical units, memory-mapped.

    `sha256` is that of the array's bytes.
    """

    name: str
    patient: str
    array: np.ndarray
    sha256: str = ""


class PreparedSplit:
    """The slices of one split of one data set.

    Slices are oriented for looking at (see `tat_core.data.volume.display_axes`): an axial slice has rows from anterior to
    posterior and columns from the patient's right to left, for every task, so that they can be drawn as they are. Different cases
    may differ in size.
    """

    def __init__(self, task: Task, cases: Sequence[StoredCase]) -> None:
        self.task = task
        self.cases = tuple(cases)
        self._ends = list(accumulate(case.array.shape[1] for case in self.cases))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def num_patients(self) -> int:
        """How many different patients the split holds."""
        return len({case.patient for case in self.cases})

    @cached_property
    def slices_by_patient(self) -> dict[str, list[int]]:
        """Pseudonym of each patient to the indices of that patient's slices. Stays at the site."""
        slices: dict[str, list[int]] = {}
        for case, end in zip(self.cases, self._ends, strict=True):
            slices.setdefault(case.patient, []).extend(range(end - case.array.shape[1], end))
        return slices

    def _locate(self, index: int) -> tuple[StoredCase, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"PreparedSplit: expected an index from 0 to {len(self) - 1}, got {index}")
        number = bisect.bisect_right(self._ends, index)
        return self.cases[number], index - (self._ends[number - 1] if number else 0)

    def case(self, index: int) -> str:
        """Name of the case of a slice. Stays at the site."""
        return self._locate(index)[0].name

    def patient(self, index: int) -> str:
        """Pseudonym of the patient of a slice. Stays at the site."""
        return self._locate(index)[0].patient

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """LQ and HQ of a slice, (rows, columns) float32 in ``task.unit``; read-only views of the memory map."""
        case, k = self._locate(index)
        return case.array[0, k], case.array[1, k]


def open_split(prepared_dir: Path, split: str) -> PreparedSplit:
    """Open one split that `prepare` wrote.

    Parameters
    ----------
    prepared_dir : pathlib.Path
    split : str
        ``"train"``, ``"validation"`` or ``"test"``; it may be empty (length 0).

    Raises
    ------
    ValueError
        If the store is missing, of another version or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"open_split: expected {', '.join(SPLITS)}, got {split!r}; choose one of them")
    manifest = read_json(prepared_dir / "manifest.json", "open_split")
    if manifest.get("store") != STORE_VERSION:
        raise ValueError(
            f"open_split: expected store version {STORE_VERSION}, got {manifest.get('store')!r}; run tat data prepare again"
        )
    cases = []
    for entry in manifest["splits"][split]:
        try:
            array = np.load(prepared_dir / entry["file"], mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise ValueError(
                "open_split: expected the stored cases of the manifest, got one missing or damaged; prepare again"
            ) from None
        if list(array.shape) != entry["shape"]:
            raise ValueError("open_split: expected the shapes of the manifest, got others; delete the store and prepare again")
        cases.append(StoredCase(entry["case"], entry["patient"], np.asarray(array), entry["sha256"]))
    return PreparedSplit(TASKS[manifest["task"]], cases)


def prepare(dataset_dir: Path, prepared_dir: Path | None = None, workers: int = 1) -> Path:
    """Decode a data set into the store that training reads; returns at once when nothing changed.

    Cases that cannot be used go to quarantine.json with a reason and training goes on without them. An interrupted call goes on
    where it was; a second one redoes only what changed. Of several at a time, one works and the others wait.

    Parameters
    ----------
    dataset_dir : pathlib.Path
        Folder with dataset.json, splits.json, LQ and HQ.
    prepared_dir : pathlib.Path, optional
        Default ``<dataset_dir>/prepared``.
    workers : int
        Processes; each holds one case in memory.

    Returns
    -------
    pathlib.Path
        The store's folder, for `open_split`.

    Raises
    ------
    ValueError
        If the data set is wrong as a whole, a patient is in several splits without that being declared, or over 5 % of the cases
        that have a split are bad.
    """
    store = prepared_dir or dataset_dir / "prepared"
    with _alone_in(store):
        return _prepare(dataset_dir, store, workers)


@contextlib.contextmanager
def _alone_in(store: Path) -> Iterator[None]:
    """Wait until no other process prepares this store; one removes as leftovers what another has half written."""
    try:
        store.mkdir(exist_ok=True)
        folder = os.open(store, os.O_RDONLY)
    except OSError:  # what is wrong is said better later
        yield
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however it ends
        yield
    finally:
        os.close(folder)


def _prepare(dataset_dir: Path, store: Path, workers: int) -> Path:
    data = open_data_set(dataset_dir)
    _refuse_leak(data)
    used = [case for case in data.cases if case.split and case.name not in data.quarantine]
    known = _known_entries(store, data.task)
    entries: dict[str, dict[str, Any]] = {}
    jobs = []
    for case in used:
        source, old = _source_stamp(case), known.get(case.name)
        if old is not None and old["source"] == source and _is_complete(store, old):
            entries[case.name] = old
        else:
            jobs.append((case, data.task, store, source))
    bad: dict[str, str] = {}
    if jobs:
        store.mkdir(parents=True, exist_ok=True)
    for (case, *_), outcome in run_each(_store_case, jobs, workers, "Preparing cases"):
        if isinstance(outcome, ValueError):
            bad[case.name] = str(outcome)
        else:
            entries[case.name] = outcome
            with (store / _JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(outcome) + "\n")
    if bad:
        write_json(dataset_dir / "quarantine.json", {"format": 1, "cases": data.quarantine | bad})
    _refuse_if_mostly_bad(*count_bad(data, data.quarantine | bad))
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for case in used:
        if case.name in entries:
            splits[case.split].append(entries[case.name] | {"patient": case.patient})
    _write_manifest(store, {"store": STORE_VERSION, "task": data.task.name, "unit": data.task.unit, "splits": splits})
    return store


def _known_entries(store: Path, task: Task) -> dict[str, dict[str, Any]]:
    """Cases that an earlier or interrupted call stored."""
    known: dict[str, dict[str, Any]] = {}
    try:
        manifest = read_json(store / "manifest.json", "prepare")
    except ValueError:  # none yet, or damaged: then everything is stored again
        manifest = {}
    if manifest.get("store") == STORE_VERSION and manifest.get("task") == task.name:
        known = {entry["case"]: entry for entries in manifest["splits"].values() for entry in entries}
    if (store / _JOURNAL).exists():
        for line in (store / _JOURNAL).read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                entry = json.loads(line)
                if entry["task"] == task.name:
                    known[entry["case"]] = entry
    return known


def _is_complete(store: Path, entry: dict[str, Any]) -> bool:
    try:
        return (store / entry["file"]).stat().st_size >= 4 * int(np.prod(entry["shape"]))
    except OSError:
        return False


def _write_manifest(store: Path, manifest: dict[str, Any]) -> None:
    """Publish the store, then drop what it no longer names."""
    file = store / "manifest.json"
    store.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text("utf-8") != as_json(manifest):
        write_json(file, manifest)
    (store / _JOURNAL).unlink(missing_ok=True)
    named = {store / entry["file"] for entries in manifest["splits"].values() for entry in entries}
    for path in store.glob("*.npy"):
        if path not in named:
            path.unlink()


def leaks(data: DataSet) -> list[tuple[str, ...]]:
    """The splits of each patient who is in several; names nobody. Cases without a patient are not compared."""
    splits_of: dict[str, set[str]] = defaultdict(set)
    for case in data.cases:
        if case.split and case.patient:
            splits_of[case.patient].add(case.split)
    return [tuple(sorted(splits)) for _, splits in sorted(splits_of.items()) if len(splits) > 1]


def leak_is_declared(data: DataSet) -> bool:
    """Whether dataset.json says that its splits do not keep patients apart."""
    return data.about.get("split_by") in ("slices", "published")


def count_bad(data: DataSet, bad: Collection[str]) -> tuple[int, int]:
    """How many of the cases that have a split are among the bad ones, and how many have a split.

    A bad case without a split does no harm: taking it out of splits.json must be enough.
    """
    used = [case.name for case in data.cases if case.split]
    return sum(name in bad for name in used), len(used)


def undeclared_leaks(data: DataSet) -> int:
    """How many patients are in several splits, where dataset.json does not say so."""
    return 0 if leak_is_declared(data) else len(leaks(data))


def _refuse_leak(data: DataSet) -> None:
    leaking = undeclared_leaks(data)
    if leaking:
        raise ValueError(
            f"prepare: expected each patient in one split, got {leaking} in several; move all cases of a patient to one split"
        )


def _refuse_if_mostly_bad(bad: int, total: int) -> None:
    if total == 0:
        raise ValueError("prepare: expected cases with a split, got none; fill splits.json")
    if bad > MAX_BAD_FRACTION * total:
        raise ValueError(
            f"prepare: expected at most {MAX_BAD_FRACTION:.0%} unusable cases, got {bad} of {total}; run tat data check"
        )


def _source_stamp(case: Case) -> str:
    """Changes whenever a source file is added, removed, resized or written again."""
    digest = hashlib.sha256()
    for side in (case.lq, case.hq):
        if side is None:
            continue
        files = sorted(side.rglob("*")) if side.is_dir() else [side]
        for file in files:
            state = file.stat(follow_symlinks=False)
            digest.update(f"{file.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _store_case(job: tuple[Case, Task, Path, str]) -> dict[str, Any]:
    case, task, store, source = job
    lq, hq, spacing_mm = read_pair(case, task)
    array = np.stack([lq, hq])
    name = hashlib.sha256(case.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    temporary = store / f".{name}.{os.getpid()}.part.npy"
    try:
        np.save(temporary, array)
        os.replace(temporary, store / f"{name}.npy")
    finally:
        temporary.unlink(missing_ok=True)
    digest = hashlib.sha256(array.data).hexdigest()
    return {
        "case": case.name,
        "task": task.name,
        "file": f"{name}.npy",
        "shape": list(array.shape),
        "spacing_mm": [round(value, 4) for value in spacing_mm],
        "sha256": digest,
        "source": source,
    }


def read_pair(case: Case, task: Task) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Both sides of a case as (slices, rows, columns) float32 in display orientation and physical units, and their spacing.

    Raises
    ------
    ValueError
        If a side is missing or unreadable, the grids differ, or a value is not finite.
    """
    if case.lq is None or case.hq is None:
        raise ValueError(f"read_pair: expected both sides, got no {'LQ' if case.lq is None else 'HQ'}; add it or remove the case")
    lq, hq = read_volume(case.lq, task), read_volume(case.hq, task)
    if lq.voxels.shape != hq.voxels.shape:
        raise ValueError(
            f"read_pair: expected equal shapes, got LQ {lq.voxels.shape} and HQ {hq.voxels.shape}; resample one to the other"
        )
    if not np.allclose(lq.affine, hq.affine, atol=0.05):
        raise ValueError("read_pair: expected LQ and HQ on one grid, got different affines; register and resample them")
    if not (np.isfinite(lq.voxels).all() and np.isfinite(hq.voxels).all()):
        raise ValueError("read_pair: expected finite values, got NaN or infinity; export the images again")
    order, _ = display_axes(hq)
    return to_display(lq), to_display(hq), tuple(hq.spacing_mm[axis] for axis in order)
