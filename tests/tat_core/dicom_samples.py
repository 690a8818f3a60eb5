"""Small DICOM series for the tests of this folder."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from tat_core.data.dicom_write import write_dicom_series
from tat_core.data.volume import Volume

HALF_LIFE_S = 6586.2


def ramp_volume(affine: np.ndarray | None = None, shape: tuple[int, int, int] = (7, 6, 5)) -> Volume:
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 100
    return Volume(voxels, np.diag([2.0, 1.5, 3.0, 1.0]) if affine is None else affine, "HU")


def turned_affine(permutation: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (row, sign) in enumerate(zip(permutation, signs, strict=True)):
        affine[row, axis] = sign * (1.5, 2.0, 2.5)[axis]
    affine[:3, 3] = 10.25, -20.5, 30.75
    return affine


def write_ct(folder: Path, volume: Volume | None = None, **options: object) -> Path:
    arguments = {"modality": "CT", "patient": "p", "study_key": "study", "series_key": "series"} | options
    write_dicom_series(volume or ramp_volume(), folder, **arguments)  # type: ignore[arg-type]
    return folder


def multi_frame(volume: Volume, folder: Path, *, intercept: int = -1024, shared_rescale: bool = False) -> Path:
    """The volume as one enhanced CT object of unsigned 12-bit, frames in a scrambled order, made from the single-frame files."""
    slices = [pydicom.dcmread(path) for path in sorted(write_ct(folder / "single", volume).iterdir())]
    order = np.random.default_rng(0).permutation(len(slices))
    enhanced = pydicom.dcmread(sorted((folder / "single").iterdir())[0])
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(enhanced, keyword)
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    enhanced.NumberOfFrames = len(slices)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = slices[0].PixelSpacing, slices[0].SliceThickness
    orientation.ImageOrientationPatient = slices[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    enhanced.SharedFunctionalGroupsSequence = [shared]
    rescale = Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, intercept, "HU"
    if shared_rescale:
        shared.PixelValueTransformationSequence = [rescale]
    groups = []
    for k in order:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = slices[k].ImagePositionPatient
        group.PlanePositionSequence = [place]
        if not shared_rescale:
            group.PixelValueTransformationSequence = [copy.deepcopy(rescale)]
        groups.append(group)
    enhanced.PerFrameFunctionalGroupsSequence = groups
    enhanced.BitsStored, enhanced.HighBit, enhanced.PixelRepresentation = 12, 11, 0
    stored = np.stack([slices[k].pixel_array for k in order]) - intercept
    assert stored.min() >= 0
    assert stored.max() < 4096
    enhanced.PixelData = stored.astype(np.uint16).tobytes()
    enhanced.save_as(folder / "enhanced.dcm")
    return folder / "enhanced.dcm"


def pet_header(**elements: object) -> Dataset:
    """70 kg, 350 MBq of F-18 injected one half-life before the scan."""
    tracer = Dataset()
    tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 350e6, HALF_LIFE_S
    tracer.RadiopharmaceuticalStartTime = "100000"
    header = Dataset()
    header.Units, header.PatientWeight, header.DecayCorrection = "BQML", 70.0, "START"
    header.SeriesDate = header.AcquisitionDate = "20200101"
    header.SeriesTime = header.AcquisitionTime = "114946.2"
    header.RadiopharmaceuticalInformationSequence = [tracer]
    for keyword, value in elements.items():
        target = tracer if keyword in tracer or (keyword.startswith("Radio") and not keyword.endswith("Sequence")) else header
        if value is None:
            delattr(target, keyword)
        else:
            setattr(target, keyword, value)
    return header
