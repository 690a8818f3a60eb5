"""What can be wrong with one LQ/HQ pair."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.registration import phase_cross_correlation

from tat_core.data.dataset import Case
from tat_core.data.dicom_read import identifying_elements, modality_of
from tat_core.data.listing import files_below
from tat_core.data.prepared import read_pair
from tat_core.data.volume import NIFTI_SUFFIXES, nifti_texts
from tat_core.tasks import Task

MAX_SHIFT_PIXELS = 1.0
_SHIFT_SLICES = 5


@dataclass(frozen=True)
class Finding:
    """One thing that a data manager should know.

    Attributes
    ----------
    level : str
        ``"error"`` (the case, or without a case the data set, cannot be used) or ``"warning"``.
    case : str
        Empty if it concerns the whole data set.
    code : str
        Stable name for programs.
    what, why, do : str
        What was seen, why it matters and what to do.
    """

    level: str
    case: str
    code: str
    what: str
    why: str
    do: str


@dataclass(frozen=True)
class CaseFacts:
    """What the check of a whole data set needs to remember of a case."""

    findings: tuple[Finding, ...]
    slice_hashes: tuple[str, ...]


def check_case(job: tuple[Case, Task]) -> CaseFacts:
    """Look at one pair; ValueError if it cannot be read as one (see `tat_core.data.prepared.read_pair`)."""
    case, task = job
    lq, hq, _ = read_pair(case, task)
    findings = [
        *unit_findings(case.name, hq, task),
        *_content(case.name, lq, hq),
        *_registration(case.name, lq, hq),
        *_burned_in(case.name, hq),
        *_headers(case),
    ]
    hashes = [hashlib.sha256(np.ascontiguousarray(slice_).data).hexdigest() for slice_ in hq if np.ptp(slice_) > 0]
    return CaseFacts(tuple(findings), tuple(hashes))


def unit_findings(case: str, hq: np.ndarray, task: Task) -> Iterator[Finding]:
    """Whether values can be in the unit of the task at all: CT with air, PET in SUV, MRI not yet scaled."""
    low, high = (float(value) for value in np.percentile(hq, (0.5, 99.9)))
    why = f"values must be {task.unit}, as all other hospitals' are"
    if task.name == "CT":
        if low > -200.0:
            do = "export with rescale slope and intercept, so that air is -1000 and water 0"
            yield Finding("error", case, "unit", f"no air: the lowest values are about {low:.0f} HU", why, do)
        elif high < 100.0 or low < -4000.0:
            do = "look at the rescale slope and intercept"
            yield Finding("error", case, "unit", f"values from {low:.0f} to {high:.0f} HU are no body", why, do)
    elif task.name == "PET":
        if high > 200.0:
            do = "convert to SUV by body weight, or give DICOM with dose, weight and times"
            yield Finding("error", case, "unit", f"values up to {high:.0f} look like Bq/ml, not SUV", why, do)
        elif high < 0.2:
            yield Finding("warning", case, "unit", f"values end at {high:.3g} SUV", why, "check dose, weight and injection time")
    elif high <= 1.5:
        do = "give the scanner's values, not ones scaled to 0-1"
        yield Finding("error", case, "unit", f"values end at {high:.3g}: already scaled", why, do)
    elif high > task.intensity_range[1] or high < 0.1 * task.intensity_range[1]:
        what = f"values end at {high:.0f}, the task's range at {task.intensity_range[1]:.0f}"
        do = "multiply the whole data set by one number, so that it fills the range, and note it in dataset.json"
        yield Finding("warning", case, "range", what, "what is outside is cut off; what is far inside is learnt poorly", do)
    if task.name != "CT" and float(np.mean(hq < 0)) > 0.01:
        what = f"{np.mean(hq < 0):.0%} of the values are negative"
        yield Finding(
            "warning", case, "negative", what, "they are cut off at 0", "look at the reconstruction or the rescale intercept"
        )


def _content(case: str, lq: np.ndarray, hq: np.ndarray) -> Iterator[Finding]:
    if np.ptp(hq) == 0 or np.ptp(lq) == 0:
        yield Finding(
            "error", case, "constant", "one side has the same value everywhere", "nothing can be learnt", "export it again"
        )
        return
    empty = float(np.mean([np.ptp(slice_) == 0 for slice_ in hq]))
    if empty > 0.2:
        yield Finding(
            "warning", case, "empty-slices", f"{empty:.0%} of the slices are empty", "training time is lost", "cut them off"
        )
    if np.array_equal(lq, hq):
        what = "LQ and HQ are the same image"
        yield Finding("error", case, "identical", what, "the network would learn to do nothing", "give the low-quality image")


def _registration(case: str, lq: np.ndarray, hq: np.ndarray) -> Iterator[Finding]:
    """The median shift between the sides over a few slices with much content."""
    if min(hq.shape[1:]) < 16 or np.ptp(hq) == 0 or np.ptp(lq) == 0:
        return
    content = hq.std(axis=(1, 2))
    shifts = []
    for k in np.argsort(content)[-_SHIFT_SLICES:]:
        sides = [gaussian_filter(np.asarray(side[k], np.float64), 1.5) for side in (hq, lq)]
        if min(float(np.ptp(side)) for side in sides) > 0:
            shift, _, _ = phase_cross_correlation(*sides, upsample_factor=10, normalization=None)
            shifts.append(float(np.linalg.norm(shift)))
    if shifts and np.median(shifts) > MAX_SHIFT_PIXELS:
        what = f"LQ and HQ are shifted by about {np.median(shifts):.1f} pixels"
        yield Finding("error", case, "shifted", what, "the network would learn to move and blur", "register LQ to HQ")


def _burned_in(case: str, hq: np.ndarray) -> Iterator[Finding]:
    """Text in the picture stays at one place through all slices, at the highest value there is."""
    if len(hq) < 3 or np.ptp(hq) == 0:
        return
    always = (hq >= hq.max()).mean(axis=0) > 0.8
    if 20 <= int(always.sum()) < 0.05 * always.size:
        what = f"{int(always.sum())} pixels have the highest value in nearly all slices: burned-in text?"
        yield Finding("warning", case, "burned-in", what, "text may name the patient", "look with: tat data show")


def _headers(case: Case) -> Iterator[Finding]:
    found: set[str] = set()
    for side in (case.lq, case.hq):
        assert side is not None
        found |= _identifying(side)
    if found:
        what = f"headers may identify the patient: {', '.join(sorted(found))}"
        yield Finding(
            "warning", case.name, "identifying-header", what, "the files lie where training runs", "de-identify the files"
        )


def _identifying(side: Path) -> set[str]:
    if side.name.lower().endswith(NIFTI_SUFFIXES):
        return nifti_texts(side)
    for path in files_below(side):
        if modality_of([path]):  # what else lies beside the images (a readme, a directory) is skipped, as in reading them
            return identifying_elements(path)
    return set()
