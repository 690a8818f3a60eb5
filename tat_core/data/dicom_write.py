"""Volumes to DICOM series made from scratch, with deterministic UIDs and no identity but a given pseudonym."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

from tat_core.data.volume import Volume, as_dtype

_SOP_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
_FIXED: dict[str, dict[str, object]] = {
    "CT": {"RescaleType": "HU", "KVP": "120", "AcquisitionNumber": "1"},
    "MR": {
        "ScanningSequence": "RM",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "RepetitionTime": "",
        "EchoTime": "",
        "EchoTrainLength": "",
    },
    "PT": {
        "Units": "GML",
        "SUVType": "BW",
        "CountsSource": "EMISSION",
        "SeriesType": ["STATIC", "IMAGE"],
        "DecayCorrection": "ADMIN",
    },
}


def write_dicom_series(
    volume: Volume,
    folder: Path,
    *,
    modality: str,
    patient: str,
    study_key: str,
    series_key: str,
    series_number: int = 1,
    description: str = "",
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write one single-frame DICOM file a slice; atomic for the whole folder.

    Parameters
    ----------
    volume : Volume
        Its k axis counts the slices, i the columns, j the rows; the first two must be perpendicular.
    folder : pathlib.Path
        New folder; must not exist.
    modality : str
        ``"CT"`` or ``"MR"`` (stored as int16 without scaling) or ``"PT"`` (SUV, uint16 with one slope a slice).
    patient : str
        Pseudonym, used as ID and name.
    study_key, series_key : str
        UIDs are derived from these, so that the same keys give the same UIDs.
    extra : mapping
        Further elements by keyword, such as ``Manufacturer``.

    Raises
    ------
    ValueError
        If the folder exists or the grid cannot be expressed in DICOM.
    """
    if folder.exists():
        raise ValueError("write_dicom_series: expected a new folder, got one that exists; nothing was overwritten")
    axes = volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)
    if abs(float(axes[:, 0] @ axes[:, 1])) > 1e-4:
        raise ValueError("write_dicom_series: expected perpendicular rows and columns, got a sheared grid; write NIfTI instead")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    try:
        for k in range(volume.voxels.shape[2]):
            dataset = _slice(volume, k, modality, patient, study_key, series_key)
            dataset.SeriesNumber, dataset.SeriesDescription = series_number, description
            for keyword, value in (extra or {}).items():
                setattr(dataset, keyword, value)
            dataset.save_as(temporary / f"{k:04d}.dcm", enforce_file_format=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _slice(volume: Volume, k: int, modality: str, patient: str, study_key: str, series_key: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = _SOP_CLASSES[modality]
    dataset.SOPInstanceUID = new_uid(study_key, series_key, str(k))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = new_uid(study_key), new_uid(study_key, series_key)
    dataset.FrameOfReferenceUID = new_uid(study_key, "frame of reference")
    for keyword in (
        *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientBirthDate", "PatientSex"),
        *("PositionReferenceIndicator", "Manufacturer", "Laterality"),
    ):
        setattr(dataset, keyword, "")
    dataset.PatientID, dataset.PatientName = patient, patient
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "made from voxels alone"
    dataset.Modality, dataset.PatientPosition, dataset.InstanceNumber = modality, "HFS", k + 1
    dataset.ImageType = ["DERIVED", "SECONDARY"] + (["AXIAL"] if modality == "CT" else ["OTHER"] if modality == "MR" else [])
    for keyword, value in _FIXED[modality].items():
        setattr(dataset, keyword, value)
    _set_geometry(dataset, volume, k)
    _set_pixels(dataset, volume.voxels[:, :, k].T, modality)
    return dataset


def _set_geometry(dataset: Dataset, volume: Volume, k: int) -> None:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    column_mm, row_mm, slice_mm = volume.spacing_mm
    orientation = np.concatenate([lps[:3, 0] / column_mm, lps[:3, 1] / row_mm])
    position = lps[:3, 3] + k * lps[:3, 2]
    dataset.ImageOrientationPatient = [DSfloat(float(value), auto_format=True) for value in orientation]
    dataset.ImagePositionPatient = [DSfloat(float(value), auto_format=True) for value in position]
    dataset.PixelSpacing = [DSfloat(row_mm, auto_format=True), DSfloat(column_mm, auto_format=True)]
    dataset.SliceThickness = DSfloat(slice_mm, auto_format=True)


def _set_pixels(dataset: Dataset, image: np.ndarray, modality: str) -> None:
    slope, stored_type = 1.0, np.int16
    if modality == "PT":
        stored_type = np.uint16  # type: ignore[assignment]
        slope = float(DSfloat(max(float(image.max(initial=0.0)), 1e-3) / 65535.0, auto_format=True))
    stored = as_dtype(image / np.float32(slope), stored_type)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = image.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(stored_type is np.int16)
    if modality != "MR":
        dataset.RescaleIntercept, dataset.RescaleSlope = 0, DSfloat(slope, auto_format=True)
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()


def new_item(**elements: object) -> Dataset:
    """A sequence item with these elements."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def copy_of(original: Dataset, dropped: Collection[str], kept_private_group: int) -> Dataset:
    """A copy to be written uncompressed, without some elements, private ones (but of one group) and any that does not parse."""
    copied = Dataset()
    unwanted = {tag_for_keyword(keyword) for keyword in dropped}
    for tag in original.keys():  # noqa: SIM118 - iterating a data set would parse, and may raise
        if tag in unwanted or tag.group == 2 or (tag.is_private and tag.group != kept_private_group):
            continue
        with contextlib.suppress(Exception):
            copied[tag] = copy.deepcopy(original[tag])
    copied.file_meta = FileMetaDataset()
    copied.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return copied


def new_uid(*keys: str) -> str:
    """The UID that belongs to these keys; the same keys give the same one."""
    return str(generate_uid(entropy_srcs=["fed-tat", *keys]))
