"""DICOM slices to one array with geometry: single-frame and enhanced multi-frame, any transfer syntax with a plug-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import iter_pixels, pixel_array

from tat_core.data.suv import suv_factor

MAX_VOXELS = 2**28  # 1 GiB in float32: 1024 slices of 512 × 512
MODALITIES = {"CT": "CT", "MRI": "MR", "PET": "PT"}
_POSITION_TOLERANCE_MM = 0.01
_SPACING_TOLERANCE = 0.1  # of the distance between slices


@dataclass(frozen=True)
class DicomSeries:
    """One series as an array; fields as in `tat_core.data.volume.Volume`."""

    voxels: np.ndarray
    affine: np.ndarray
    modality: str
    stored_dtype: str
    patient: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Frame:
    dataset: Any
    index: int | None  # frame number within a multi-frame object
    position: np.ndarray
    orientation: np.ndarray
    spacing_mm: np.ndarray  # between rows, between columns
    slope: float
    intercept: float


def read_dicom_files(paths: Sequence[Path], task_name: str) -> DicomSeries:
    """Read the files of one series; see `tat_core.data.volume.read_volume`.

    Raises
    ------
    ValueError
        If the files are no images, or not of one series, or slices are missing, doubled with different content or differ in
        shape.
    OSError
        If a file cannot be read.
    """
    datasets, skipped = _open_images(paths)
    modality = _one_value(datasets, "Modality", "modality")
    if modality != MODALITIES[task_name]:
        raise ValueError(
            f"read_dicom: expected modality {MODALITIES[task_name]} for {task_name}, got {modality!r}; choose the right task"
        )
    _one_value(datasets, "SeriesInstanceUID", "series")
    rows, columns = _image_size(datasets)
    frames = [frame for dataset in datasets for frame in _frames(dataset)]
    if len(frames) * rows * columns > MAX_VOXELS:
        raise ValueError(
            f"read_dicom: expected at most {MAX_VOXELS} voxels, got {len(frames)} slices of {rows} × {columns}; split the series"
        )
    frames, notes = _sorted_by_geometry(frames)
    factor, unit_note = suv_factor(frames[0].dataset) if task_name == "PET" else (1.0, "")
    stack = np.empty((len(frames), rows, columns), np.float32)
    stored_dtype = ""
    decoded: dict[int, Any] = {}
    for k, frame in enumerate(frames):
        pixels = _decode(frame, decoded, (rows, columns))
        stored_dtype = stored_dtype or pixels.dtype.name
        np.multiply(pixels, np.float32(frame.slope * factor), out=stack[k], casting="unsafe")
        if frame.intercept:
            stack[k] += np.float32(frame.intercept * factor)
    duplicates = _drop_duplicates(frames, stack)
    if skipped:
        notes.append(f"{skipped} files are not DICOM images and were left out")
    if unit_note:
        notes.append(unit_note)
    if len(duplicates) < len(frames):
        notes.append(f"{len(frames) - len(duplicates)} slices came twice with the same content; one of each was kept")
        frames, stack = [frames[k] for k in duplicates], stack[duplicates]
    affine = _affine(frames, notes)
    patient = str(datasets[0].get("PatientID", "") or "")
    return DicomSeries(stack.transpose(2, 1, 0), affine, modality, stored_dtype, patient, tuple(notes))


def _open_images(paths: Sequence[Path]) -> tuple[list[Any], int]:
    datasets, skipped, damaged = [], 0, 0
    for path in paths:
        try:
            dataset = pydicom.dcmread(path)
            has_pixels = any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
        except InvalidDicomError:
            skipped += 1
        except OSError:
            raise
        except Exception:  # a damaged header raises almost anything
            damaged += 1
        else:
            if has_pixels:
                datasets.append(dataset)
            else:
                skipped += 1
    if damaged:
        raise ValueError(f"read_dicom: expected readable files, got {damaged} damaged of {len(paths)}; retrieve the series again")
    if not datasets:
        raise ValueError(f"read_dicom: expected DICOM images, got {len(paths)} files without any; give the folder of a series")
    return datasets, skipped


def _one_value(datasets: Sequence[Any], keyword: str, what: str) -> str:
    values = {str(dataset.get(keyword, "") or "") for dataset in datasets}
    if len(values) != 1:
        raise ValueError(
            f"read_dicom: expected one {what}, got {len(values)} mixed in one folder; put each series into its own folder"
        )
    return values.pop()


def _image_size(datasets: Sequence[Any]) -> tuple[int, int]:
    sizes = set()
    for dataset in datasets:
        if str(dataset.get("PhotometricInterpretation", "")) not in ("MONOCHROME1", "MONOCHROME2"):
            raise ValueError(
                "read_dicom: expected grey images, got a colour image or none; screenshots and reports cannot be used"
            )
        if "ModalityLUTSequence" in dataset:
            raise ValueError(
                "read_dicom: expected a rescale slope, got a modality look-up table; export the series with linear rescale"
            )
        sizes.add((_number(dataset, "Rows"), _number(dataset, "Columns")))
    if len(sizes) != 1:
        raise ValueError(
            f"read_dicom: expected slices of one size, got {len(sizes)} sizes; remove localisers and mixed acquisitions"
        )
    rows, columns = sizes.pop()
    if not (1 <= rows <= 65535 and 1 <= columns <= 65535):
        raise ValueError(f"read_dicom: expected an image, got {rows} rows and {columns} columns; retrieve the series again")
    return int(rows), int(columns)


def _number(dataset: Any, keyword: str, default: float | None = None) -> float:
    try:
        value = dataset.get(keyword)
        number = default if value is None or value == "" else float(value)
    except Exception:  # a value that does not parse as its VR
        number = None
    if number is None or not np.isfinite(number):
        raise ValueError(f"read_dicom: expected a number in {keyword}, got none; retrieve the series again")
    return number


def _vector(dataset: Any, keyword: str, length: int) -> np.ndarray:
    try:
        vector = np.array([float(value) for value in dataset.get(keyword) or ()])
    except Exception:
        vector = np.empty(0)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(
            f"read_dicom: expected {length} numbers in {keyword}, got {vector.size}; only images with geometry can be used"
        )
    return vector


def _frames(dataset: Any) -> list[_Frame]:
    """One entry per 2-D frame, with the geometry and rescale of that frame."""
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        count = _number(dataset, "NumberOfFrames", 1)
        if count != 1:
            raise ValueError(
                f"read_dicom: expected geometry for each frame, got {count:g} frames without; export as enhanced or single-frame"
            )
        return [_frame(dataset, None, dataset, dataset, dataset, dataset)]
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    groups = dataset.PerFrameFunctionalGroupsSequence
    if len(groups) != int(_number(dataset, "NumberOfFrames", 1)):
        raise ValueError(f"read_dicom: expected geometry for each frame, got {len(groups)} entries; retrieve the object again")

    def part(group: Any, keyword: str) -> Any:
        for holder in (group, shared):
            if keyword in holder and len(holder[keyword].value):
                return holder[keyword].value[0]
        return {}

    return [
        _frame(
            dataset,
            index,
            part(group, "PlanePositionSequence"),
            part(group, "PlaneOrientationSequence"),
            part(group, "PixelMeasuresSequence"),
            part(group, "PixelValueTransformationSequence"),
        )
        for index, group in enumerate(groups)
    ]


def _frame(dataset: Any, index: int | None, place: Any, orientation: Any, measures: Any, rescale: Any) -> _Frame:
    spacing = _vector(measures, "PixelSpacing", 2)
    axes = _vector(orientation, "ImageOrientationPatient", 6)
    if (spacing <= 0).any():
        raise ValueError("read_dicom: expected a positive pixel spacing, got zero or less; retrieve the series again")
    gram = axes.reshape(2, 3) @ axes.reshape(2, 3).T
    if not np.allclose(gram, np.eye(2), atol=1e-2):
        raise ValueError(
            "read_dicom: expected two perpendicular unit vectors as image orientation, got others; retrieve the series again"
        )
    position = _vector(place, "ImagePositionPatient", 3)
    slope, intercept = _number(rescale, "RescaleSlope", 1.0), _number(rescale, "RescaleIntercept", 0.0)
    if slope == 0.0:
        raise ValueError("read_dicom: expected a rescale slope, got 0; retrieve the series again")
    return _Frame(dataset, index, position, axes, spacing, slope, intercept)


def _sorted_by_geometry(frames: Sequence[_Frame]) -> tuple[list[_Frame], list[str]]:
    first = frames[0]
    for frame in frames:
        if not np.allclose(frame.orientation, first.orientation, atol=1e-3) or not np.allclose(
            frame.spacing_mm, first.spacing_mm, rtol=1e-3
        ):
            raise ValueError(
                "read_dicom: expected parallel slices of one pixel size, got several; remove localisers and reformats"
            )
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    return sorted(frames, key=lambda frame: float(frame.position @ normal)), []


def _decode(frame: _Frame, decoded: dict[int, Any], shape: tuple[int, int]) -> np.ndarray:
    """Pixels of one frame; a multi-frame object is decoded once and kept while its frames are asked for."""
    try:
        if frame.index is None:
            pixels = pixel_array(frame.dataset)
        else:
            key = id(frame.dataset)
            if key not in decoded:
                decoded[key] = list(iter_pixels(frame.dataset))
            pixels = decoded[key][frame.index]
    except Exception as error:  # each decoder has its own kinds
        raise ValueError(
            f"read_dicom: expected pixel data that decode, got {type(error).__name__}; damaged, or an unknown transfer syntax"
        ) from None
    if pixels.shape != shape:
        raise ValueError(f"read_dicom: expected pixels of shape {shape}, got {pixels.shape}; retrieve the series again")
    return pixels


def _drop_duplicates(frames: Sequence[_Frame], stack: np.ndarray) -> list[int]:
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


def _affine(frames: Sequence[_Frame], notes: list[str]) -> np.ndarray:
    """Index (column, row, slice) to right-anterior-superior mm."""
    first, last = frames[0], frames[-1]
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    if len(frames) == 1:
        thickness = _number(first.dataset, "SliceThickness", 1.0)
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


IDENTIFYING = (
    *("PatientName", "PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs", "OtherPatientNames"),
    *(
        "InstitutionName",
        "InstitutionAddress",
        "ReferringPhysicianName",
        "PerformingPhysicianName",
        "OperatorsName",
        "AccessionNumber",
    ),
    *("StudyDate", "IssuerOfPatientID", "AdditionalPatientHistory", "PatientComments"),
)


def identifying_elements(path: Path) -> set[str]:
    """Keywords of filled elements that may name a patient; empty for a file that states that identity was removed.

    A stated burned-in annotation counts even then.
    """
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    found = {"BurnedInAnnotation"} if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES" else set()
    if str(dataset.get("PatientIdentityRemoved", "")).upper() != "YES":
        found |= {keyword for keyword in IDENTIFYING if dataset.get(keyword)}
    return found
