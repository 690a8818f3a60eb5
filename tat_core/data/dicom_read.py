"""DICOM slices to one array with geometry: single-frame and enhanced multi-frame, any transfer syntax with a plug-in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.config
from pydicom.errors import InvalidDicomError
from pydicom.pixels import iter_pixels, pixel_array

from tat_core.data.dicom_geometry import (
    Frame,
    drop_duplicates,
    read_number,
    read_text,
    read_vector,
    sorted_by_geometry,
    stack_affine,
)
from tat_core.data.suv import suv_factor

# Values that break a rule of DICOM are common and harmless here, and warnings about them would print patients' data into logs.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it would log a traceback for each decoder that it tries
MAX_VOXELS = 2**28  # 1 GiB in float32: 1024 slices of 512 × 512
MODALITIES = {"CT": "CT", "MRI": "MR", "PET": "PT"}


@dataclass(frozen=True)
class DicomSeries:
    """One series as an array; fields as in `tat_core.data.volume.Volume`, and the frames in the order of the slices."""

    voxels: np.ndarray
    affine: np.ndarray
    modality: str
    stored_dtype: str
    patient: str
    notes: tuple[str, ...]
    frames: tuple[Frame, ...]
    unit_factor: float


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
    frames, notes = sorted_by_geometry(frames), list[str]()
    factor, unit_note = suv_factor(frames[0].dataset, datasets) if task_name == "PET" else (1.0, "")
    stack = np.empty((len(frames), rows, columns), np.float32)
    stored_dtype = ""
    decoded: dict[int, Any] = {}
    for k, frame in enumerate(frames):
        pixels = _decode(frame, decoded, (rows, columns))
        stored_dtype = stored_dtype or pixels.dtype.name
        np.multiply(pixels, np.float32(frame.slope * factor), out=stack[k], casting="unsafe")
        if frame.intercept:
            stack[k] += np.float32(frame.intercept * factor)
    duplicates = drop_duplicates(frames, stack)
    if skipped:
        notes.append(f"{skipped} files are not DICOM images and were left out")
    if unit_note:
        notes.append(unit_note)
    if len(duplicates) < len(frames):
        notes.append(f"{len(frames) - len(duplicates)} slices came twice with the same content; one of each was kept")
        frames, stack = [frames[k] for k in duplicates], stack[duplicates]
    affine = stack_affine(frames, notes)
    patient = read_text(datasets[0], "PatientID")
    return DicomSeries(stack.transpose(2, 1, 0), affine, modality, stored_dtype, patient, tuple(notes), tuple(frames), factor)


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
    values = {read_text(dataset, keyword) for dataset in datasets}
    if len(values) != 1:
        raise ValueError(
            f"read_dicom: expected one {what}, got {len(values)} mixed in one folder; put each series into its own folder"
        )
    return values.pop()


def _image_size(datasets: Sequence[Any]) -> tuple[int, int]:
    sizes = set()
    for dataset in datasets:
        if read_text(dataset, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
            raise ValueError(
                "read_dicom: expected grey images, got a colour image or none; screenshots and reports cannot be used"
            )
        if "ModalityLUTSequence" in dataset:
            raise ValueError(
                "read_dicom: expected a rescale slope, got a modality look-up table; export the series with linear rescale"
            )
        sizes.add((read_number(dataset, "Rows"), read_number(dataset, "Columns")))
    if len(sizes) != 1:
        raise ValueError(
            f"read_dicom: expected slices of one size, got {len(sizes)} sizes; remove localisers and mixed acquisitions"
        )
    rows, columns = sizes.pop()
    if not (1 <= rows <= 65535 and 1 <= columns <= 65535):
        raise ValueError(f"read_dicom: expected an image, got {rows} rows and {columns} columns; retrieve the series again")
    return int(rows), int(columns)


def _frames(dataset: Any) -> list[Frame]:
    """One entry per 2-D frame, with the geometry and rescale of that frame."""
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        count = read_number(dataset, "NumberOfFrames", 1)
        if count != 1:
            raise ValueError(
                f"read_dicom: expected geometry for each frame, got {count:g} frames without; export as enhanced or single-frame"
            )
        return [_frame(dataset, None, dataset, dataset, dataset, dataset)]
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    groups = dataset.PerFrameFunctionalGroupsSequence
    if len(groups) != int(read_number(dataset, "NumberOfFrames", 1)):
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


def _frame(dataset: Any, index: int | None, place: Any, orientation: Any, measures: Any, rescale: Any) -> Frame:
    spacing = read_vector(measures, "PixelSpacing", 2)
    axes = read_vector(orientation, "ImageOrientationPatient", 6)
    if (spacing <= 0).any():
        raise ValueError("read_dicom: expected a positive pixel spacing, got zero or less; retrieve the series again")
    gram = axes.reshape(2, 3) @ axes.reshape(2, 3).T
    if not np.allclose(gram, np.eye(2), atol=1e-2):
        raise ValueError(
            "read_dicom: expected two perpendicular unit vectors as image orientation, got others; retrieve the series again"
        )
    position = read_vector(place, "ImagePositionPatient", 3)
    slope, intercept = read_number(rescale, "RescaleSlope", 1.0), read_number(rescale, "RescaleIntercept", 0.0)
    if slope == 0.0:
        raise ValueError("read_dicom: expected a rescale slope, got 0; retrieve the series again")
    return Frame(dataset, index, position, axes, spacing, slope, intercept)


def _decode(frame: Frame, decoded: dict[int, Any], shape: tuple[int, int]) -> np.ndarray:
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


def by_series(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files grouped by their series; what is no readable DICOM is left out."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        try:
            series = str(pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"]).get("SeriesInstanceUID") or "")
        except Exception:  # not DICOM, damaged or unreadable: reading the series will say so
            continue
        groups.setdefault(series, []).append(path)
    return groups


def modality_of(paths: Sequence[Path]) -> str:
    """The modality of the first DICOM image among some files; empty if there is none."""
    for path in paths:
        try:
            modality = pydicom.dcmread(path, specific_tags=["Modality", "Rows"]).get("Modality")
        except Exception:  # not DICOM, damaged or unreadable: the next one may tell
            continue
        if modality:
            return str(modality)
    return ""
