"""The geometry of DICOM slices: their order, what is missing or double, and the affine of the stack. Knows no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_POSITION_TOLERANCE_MM = 0.01
_SPACING_TOLERANCE = 0.1  # of the distance between slices


@dataclass(frozen=True)
class Frame:
    """Where one slice came from. Stored values × slope + intercept, times the series' `unit_factor`, are the voxels."""

    dataset: Any
    index: int | None  # frame number within a multi-frame object
    position: np.ndarray
    orientation: np.ndarray
    spacing_mm: np.ndarray  # between rows, between columns
    slope: float
    intercept: float


def read_text(dataset: Any, keyword: str) -> str:
    """An element as text, empty if it is missing; ValueError if it does not parse."""
    try:
        return str(dataset.get(keyword, "") or "")
    except Exception:
        raise ValueError(f"read_dicom: expected text in {keyword}, got what does not parse; retrieve the series again") from None


def read_number(dataset: Any, keyword: str, default: float | None = None) -> float:
    """A finite number of a data set, or a ValueError that names the element."""
    try:
        value = dataset.get(keyword)
        number = default if value is None or value == "" else float(value)
    except Exception:  # a value that does not parse as its VR
        number = None
    if number is None or not np.isfinite(number):
        raise ValueError(f"read_dicom: expected a number in {keyword}, got none; retrieve the series again")
    return number


def read_vector(dataset: Any, keyword: str, length: int) -> np.ndarray:
    """So many finite numbers of a data set, or a ValueError that names the element."""
    try:
        vector = np.array([float(value) for value in dataset.get(keyword) or ()])
    except Exception:
        vector = np.empty(0)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(
            f"read_dicom: expected {length} numbers in {keyword}, got {vector.size}; only images with geometry can be used"
        )
    return vector


def sorted_by_geometry(frames: Sequence[Frame]) -> list[Frame]:
    """Frames from the first to the last along their normal; ValueError if they are not parallel or differ in pixel size."""
    first = frames[0]
    for frame in frames:
        if not np.allclose(frame.orientation, first.orientation, atol=1e-3) or not np.allclose(
            frame.spacing_mm, first.spacing_mm, rtol=1e-3
        ):
            raise ValueError(
                "read_dicom: expected parallel slices of one pixel size, got several; remove localisers and reformats"
            )
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return sorted(frames, key=lambda frame: float(frame.position @ normal))


def drop_duplicates(frames: Sequence[Frame], stack: np.ndarray) -> list[int]:
    """Indices to keep: of slices at one place with equal content the first; different content is a mixed series."""
    kept = [0]
    for k in range(1, len(frames)):
        if np.linalg.norm(frames[k].position - frames[kept[-1]].position) > _POSITION_TOLERANCE_MM:
            kept.append(k)
        elif not np.array_equal(stack[k], stack[kept[-1]]):
            raise ValueError(
                "read_dicom: expected one image per position, got several different ones; split echoes, phases and time points"
            )
    return kept


def stack_affine(frames: Sequence[Frame], notes: list[str]) -> np.ndarray:
    """Index (column, row, slice) to right-anterior-superior mm."""
    first, last = frames[0], frames[-1]
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    if len(frames) == 1:
        thickness = read_number(first.dataset, "SliceThickness", 1.0)
        step = normal * (thickness if thickness > 0 else 1.0)
        notes.append("a single slice: the distance between slices is its thickness")
    else:
        step = (last.position - first.position) / (len(frames) - 1)
        gaps = np.diff([float(frame.position @ normal) for frame in frames])
        usual = float(np.median(gaps))
        missing = int(np.sum(np.rint(gaps / usual) - 1)) if usual > 0 else 0
        if missing > 0:
            raise ValueError(
                f"read_dicom: expected evenly spaced slices, got gaps where {missing} are missing; retrieve the series again"
            )
        if np.abs(gaps - usual).max() > _SPACING_TOLERANCE * usual:
            raise ValueError("read_dicom: expected evenly spaced slices, got varying distances; resample the series first")
    lps = np.eye(4)
    lps[:3, 0] = first.orientation[:3] * first.spacing_mm[1]
    lps[:3, 1] = first.orientation[3:] * first.spacing_mm[0]
    lps[:3, 2] = step
    lps[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
