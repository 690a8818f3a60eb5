"""A restored series as DICOM beside its source: same patient, study and geometry, new series, marked as derived."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tat_core.data.dicom_geometry import Frame, read_text
from tat_core.data.dicom_read import DicomSeries
from tat_core.data.dicom_write import copy_of, new_item, new_uid

RESEARCH_USE = "research use"
_NO_LONGER_TRUE = (
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "SmallestImagePixelValue", "LargestImagePixelValue"),
    *("IconImageSequence", "DigitalSignaturesSequence", "MACParametersSequence", "ReferencedImageEvidenceSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "OriginalAttributesSequence", "SourceImageSequence"),
)
_OF_SOURCE_VALUES = (
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"),
    *("VOILUTSequence", "FrameVOILUTSequence", "RealWorldValueMappingSequence"),
)
_TRANSFORMATION = "PixelValueTransformationSequence"
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")
_SUV_GROUP = 0x7053  # Philips' SUV factor: without it counts cannot be turned into SUV


@dataclass(frozen=True)
class Derivation:
    """What made a derived series.

    Attributes
    ----------
    model_hash : str
        sha256 of the network's parameters.
    description : str
        For DerivationDescription.
    kind : str
        ``"restored"`` or ``"residual"`` (restored minus source, may be negative).
    """

    model_hash: str
    description: str
    kind: str = "restored"


def write_derived_series(source: DicomSeries, stack: np.ndarray, folder: Path, derivation: Derivation) -> None:
    """Write a derived series into a new folder; atomic.

    Parameters
    ----------
    source : DicomSeries
        As `tat_core.data.dicom_read.read_dicom_files` returned it.
    stack : numpy.ndarray, (slices, rows, columns), float32
        New values in the unit of the source's voxels, in the order of its slices.
    folder : pathlib.Path
        Must not exist.
    derivation : Derivation

    Raises
    ------
    ValueError
        If the folder exists or the shape is not the source's.
    """
    if folder.exists():
        raise ValueError("write_derived_series: expected a new folder, got one that exists; nothing was overwritten")
    columns, rows, slices = source.voxels.shape
    if stack.shape != (slices, rows, columns):
        raise ValueError(
            f"write_derived_series: expected shape {(slices, rows, columns)}, got {stack.shape}; restore the same series"
        )
    for frame in source.frames:
        if missing := [keyword for keyword in _NEEDED if not read_text(frame.dataset, keyword)]:
            raise ValueError(
                f"write_derived_series: expected {missing[0]} in the source, got none; a derived image must name its source"
            )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for number, frames in enumerate(_by_object(source.frames)):
            derived = _derived_object(source, frames, stack, derivation)
            derived.save_as(temporary / f"{number:04d}.dcm", enforce_file_format=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _by_object(frames: Sequence[Frame]) -> Iterator[list[tuple[int, Frame]]]:
    """Slices grouped by the DICOM object that holds them, each with its place in the stack."""
    groups: dict[int, list[tuple[int, Frame]]] = {}
    for k, frame in enumerate(frames):
        groups.setdefault(id(frame.dataset), []).append((k, frame))
    yield from groups.values()


def _derived_object(source: DicomSeries, frames: list[tuple[int, Frame]], stack: np.ndarray, derivation: Derivation) -> Any:
    original = frames[0][1].dataset
    dataset = copy_of(original, _NO_LONGER_TRUE, _SUV_GROUP)
    _set_identity(dataset, original, derivation)
    _set_provenance(dataset, original, derivation)
    _set_pixels(dataset, source, frames, stack, derivation)
    return dataset


def _set_identity(dataset: Any, original: Any, derivation: Derivation) -> None:
    keys = derivation.model_hash, derivation.kind
    dataset.SOPInstanceUID = new_uid(str(original.get("SOPInstanceUID", "")), *keys)
    dataset.SeriesInstanceUID = new_uid(str(original.get("SeriesInstanceUID", "")), *keys)
    dataset.SeriesNumber = 1000 * (1 + (derivation.kind == "residual")) + int(original.get("SeriesNumber") or 0) % 1000
    suffix = f" TAT {derivation.kind} - {RESEARCH_USE}"
    dataset.SeriesDescription = str(original.get("SeriesDescription", "") or "")[: 64 - len(suffix)] + suffix
    now = datetime.now()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.ImageType = _derived_type(original.get("ImageType"))
    for group in (*_shared_groups(dataset), *_frame_groups(dataset)):
        for element in group:
            if element.keyword.endswith("FrameTypeSequence"):
                for item in element.value:
                    item.FrameType = _derived_type(item.get("FrameType"))


def _derived_type(values: Any) -> list[str]:
    listed = [str(value) for value in values] if isinstance(values, Sequence) and not isinstance(values, str) else []
    return ["DERIVED", "SECONDARY", *listed[2:]]


def _set_provenance(dataset: Any, original: Any, derivation: Derivation) -> None:
    dataset.DerivationDescription = derivation.description
    dataset.DerivationCodeSequence = [_code("RESTORE", "99FEDTAT", "Learned image restoration")]
    reference = new_item(
        ReferencedSOPClassUID=original.SOPClassUID,
        ReferencedSOPInstanceUID=original.SOPInstanceUID,
        PurposeOfReferenceCodeSequence=[_code("121322", "DCM", "Source image for image processing operation")],
    )
    if "PerFrameFunctionalGroupsSequence" in dataset:
        item = new_item(DerivationCodeSequence=dataset.DerivationCodeSequence, SourceImageSequence=[reference])
        item.DerivationDescription = derivation.description
        for group in dataset.PerFrameFunctionalGroupsSequence:
            group.DerivationImageSequence = [item]
    else:
        dataset.SourceImageSequence = [reference]
    equipment = new_item(
        PurposeOfReferenceCodeSequence=[_code("109102", "DCM", "Processing Equipment")],
        Manufacturer="fed-tat",
        ManufacturerModelName="TAT",
        SoftwareVersions=[version("fed-tat"), f"model {derivation.model_hash[:56]}"],
        ContributionDescription=f"{derivation.description}; model sha256 {derivation.model_hash}",
    )
    dataset.ContributingEquipmentSequence = [*dataset.get("ContributingEquipmentSequence", []), equipment]


def _code(value: str, scheme: str, meaning: str) -> Any:
    return new_item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _set_pixels(
    dataset: Any, source: DicomSeries, frames: list[tuple[int, Frame]], stack: np.ndarray, derivation: Derivation
) -> None:
    residual = derivation.kind == "residual"
    in_order = sorted(frames, key=lambda entry: entry[1].index or 0)
    if in_order[0][1].index is not None:  # slices that came twice are written once
        groups = dataset.PerFrameFunctionalGroupsSequence
        dataset.PerFrameFunctionalGroupsSequence = [groups[frame.index] for _, frame in in_order]
        dataset.NumberOfFrames = len(in_order)
    if residual:
        _make_signed(dataset)
    bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
    allocated = np.dtype(f"{'i' if signed else 'u'}{int(dataset.BitsAllocated) // 8}")
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def values(k: int) -> np.ndarray:
        return stack[k].astype(np.float64) / source.unit_factor

    rescales = []
    for k, frame in in_order:
        slope, intercept = frame.slope, 0.0 if residual else frame.intercept
        if source.modality == "PT" or residual:  # each PET slice may have its own slope: fit it to the new maximum
            reach = float(np.abs(values(k) - intercept).max(initial=0.0))
            slope = max(slope, float(f"{reach / highest * 1.0001:.9e}"))
        rescales.append((slope, intercept))
    if rescales != [(frame.slope, frame.intercept) for _, frame in in_order]:
        _set_rescales(dataset, rescales, in_order[0][1].index is not None)
        _drop(dataset, "RealWorldValueMappingSequence")  # maps the values as they were stored before
    planes = []
    for (k, _), (slope, intercept) in zip(in_order, rescales, strict=True):
        stored = np.clip(np.rint((values(k) - intercept) / slope), lowest, highest)
        planes.append(stored.astype(allocated.newbyteorder("<")).tobytes())
    dataset.PixelData = b"".join(planes)
    if len(dataset.PixelData) % 2:
        dataset.PixelData += b"\0"
    dataset["PixelData"].VR = "OW" if allocated.itemsize > 1 else "OB"


def _make_signed(dataset: Any) -> None:
    """Room for negative values, which the source's type may not hold, and nothing that describes the source's values."""
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    _drop(dataset, *_OF_SOURCE_VALUES)


def _set_rescales(dataset: Any, rescales: Sequence[tuple[float, float]], multi_frame: bool) -> None:
    """Slope and intercept into the header; in a multi-frame object into each frame, as they may differ between frames."""
    holders = [dataset]
    if multi_frame:
        shared = [item for group in _shared_groups(dataset) for item in group.get(_TRANSFORMATION) or []]
        for group in dataset.PerFrameFunctionalGroupsSequence:
            known = [*(group.get(_TRANSFORMATION) or []), *shared, new_item(RescaleType="US")]
            setattr(group, _TRANSFORMATION, [copy.deepcopy(known[0])])
        for group in _shared_groups(dataset):  # either shared or for each frame, never both
            if _TRANSFORMATION in group:
                delattr(group, _TRANSFORMATION)
        holders = [group[_TRANSFORMATION].value[0] for group in dataset.PerFrameFunctionalGroupsSequence]
    for holder, (slope, intercept) in zip(holders, rescales, strict=True):
        holder.RescaleSlope, holder.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"


def _drop(dataset: Any, *keywords: str) -> None:
    """Delete elements of the object and of its functional groups."""
    for holder in (dataset, *_shared_groups(dataset), *_frame_groups(dataset)):
        for keyword in keywords:
            if keyword in holder:
                delattr(holder, keyword)


def _shared_groups(dataset: Any) -> Sequence[Any]:
    return dataset.get("SharedFunctionalGroupsSequence") or []


def _frame_groups(dataset: Any) -> Sequence[Any]:
    return dataset.get("PerFrameFunctionalGroupsSequence") or []
