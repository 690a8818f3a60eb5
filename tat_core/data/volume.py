"""One 3-D image with its geometry, read from DICOM or NIfTI and written back. The sole importer of nibabel."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tat_core.data.dicom_read import MAX_VOXELS, read_dicom_files
from tat_core.data.listing import files_below
from tat_core.tasks import Task

NIFTI_SUFFIXES = (".nii", ".nii.gz")
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


@dataclass(frozen=True)
class Volume:
    """A scalar image on a regular grid.

    Attributes
    ----------
    voxels : numpy.ndarray, (I, J, K), float32
        Values in `unit`. DICOM: I columns, J rows, K slices.
    affine : numpy.ndarray, (4, 4), float64
        Index (i, j, k, 1) to patient coordinates in mm, right-anterior-superior positive (as NIfTI).
    unit : str
        ``"HU"``, ``"SUV"`` or ``"a.u."``.
    modality : str
        DICOM modality (``"CT"``, ``"MR"``, ``"PT"``), empty for NIfTI.
    stored_dtype : str
        NumPy name of the type the file stored.
    patient : str
        The site's own identifier. Never leaves the site.
    notes : tuple[str, ...]
        What a person should know about the reading; holds nothing about the patient.
    """

    voxels: np.ndarray
    affine: np.ndarray
    unit: str
    modality: str = ""
    stored_dtype: str = "float32"
    patient: str = ""
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbours along i, j and k."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])


def read_volume(path: Path, task: Task) -> Volume:
    """Read a NIfTI file, a DICOM file, or a folder that holds one DICOM series.

    Parameters
    ----------
    path : pathlib.Path
        File or folder. DICOM slices are ordered by geometry; names and order of files do not matter.
    task : Task
        Decides the unit: CT gives HU, PET gives SUV (body weight; computed from the headers for DICOM), MRI gives the scanner's
        units.

    Returns
    -------
    Volume

    Raises
    ------
    ValueError
        If the file cannot be read as one volume of that task. The text names no file and no patient.
    """
    try:
        if path.name.lower().endswith(NIFTI_SUFFIXES):
            return read_nifti(path, task.unit)
        paths = files_below(path) if path.is_dir() else [path]
        series = read_dicom_files(paths, task.name)
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise ValueError(
            f"read_volume: expected a readable file, got {type(error).__name__}; check its permissions and copy it again"
        ) from None
    return Volume(
        series.voxels, series.affine, task.unit, series.modality, series.stored_dtype, series.patient, notes=series.notes
    )


def read_nifti(path: Path, unit: str) -> Volume:
    """Read a NIfTI file of any orientation; see `read_volume`."""
    try:
        image: Any = nib.load(path)
        affine = np.array(image.affine, np.float64)
        header: Any = image.header
        shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
        space_unit = header.get_xyzt_units()[0]
        codes = int(header["sform_code"]), int(header["qform_code"])
    except (OSError, EOFError, MemoryError, zlib.error):
        raise
    except Exception as error:  # nibabel raises many kinds for damaged headers
        raise ValueError(
            f"read_nifti: expected a NIfTI header, got one that does not parse ({type(error).__name__}); convert the source again"
        ) from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"read_nifti: expected a 3-D image, got shape {shape}; extract one volume first")
    if dtype.kind not in "iuf":
        raise ValueError(
            f"read_nifti: expected integer or real voxels, got type {dtype}; colour and complex images cannot be used"
        )
    voxel_count = int(np.prod([float(n) for n in shape]))
    if voxel_count > MAX_VOXELS:
        raise ValueError(
            f"read_nifti: expected at most {MAX_VOXELS} voxels, got a header that claims {voxel_count}; crop or split it"
        )
    _refuse_short_file(path, voxel_count * dtype.itemsize)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError("read_nifti: expected an invertible affine, got a singular or non-finite one; repair sform and qform")
    try:
        with np.errstate(all="ignore"):
            voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except (OSError, EOFError, MemoryError, zlib.error):
        raise
    except Exception as error:
        raise ValueError(
            f"read_nifti: expected {voxel_count} voxels, got damaged data ({type(error).__name__}); copy it again"
        ) from None
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    stored = (
        dtype.newbyteorder("=").name if (slope, intercept) == (1.0, 0.0) else "float32"
    )  # scaled integers do not hold the values
    affine[:3] *= _MM_PER_UNIT.get(space_unit, 1.0)
    notes = ("the header states no orientation (sform and qform codes are 0)",) if codes == (0, 0) else ()
    return Volume(voxels, affine, unit, stored_dtype=stored, notes=notes)


def _refuse_short_file(path: Path, claimed_bytes: int) -> None:
    """Refuse a header that claims more than the file can hold before memory is taken for it."""
    available = path.stat().st_size
    if path.name.lower().endswith(".gz"):
        available *= 1032  # the most that deflate can compress
    if claimed_bytes > available:
        raise ValueError(f"read_nifti: expected {claimed_bytes} bytes of voxels, got a file too short for them; copy it again")


def nifti_texts(path: Path) -> set[str]:
    """Free-text fields of a NIfTI header that hold a date, a long number or a name."""
    header: Any = nib.load(path).header
    texts = {
        name: bytes(header[name]).rstrip(b"\0").decode("latin-1") for name in ("descrip", "aux_file", "db_name", "intent_name")
    }
    found = {name for name, text in texts.items() if re.search(r"(19|20)\d{6}|\d{7,}|\^", text)}
    return found | ({"extensions"} if header.extensions else set())


def write_nifti(volume: Volume, path: Path, dtype: np.dtype | type | str = np.float32) -> None:
    """Write a volume as NIfTI with its affine as sform (and qform, where it has no shear); atomic.

    Parameters
    ----------
    volume : Volume
    path : pathlib.Path
        Ends with ``.nii`` or ``.nii.gz``.
    dtype : numpy dtype
        Integer types are rounded to and clipped, not scaled.
    """
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise ValueError("write_nifti: expected a name that ends with .nii or .nii.gz, got another; rename the output")
    image = nib.Nifti1Image(as_dtype(volume.voxels, dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.set_sform(volume.affine, code=1)
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
        image.set_qform(volume.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{suffix}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_dtype(voxels: np.ndarray, dtype: np.dtype | type | str) -> np.ndarray:
    """Convert, rounding and clipping to what an integer type can hold."""
    target = np.dtype(dtype)
    if target.kind in "iu":
        limits = np.iinfo(target)
        return np.clip(np.rint(voxels.astype(np.float64)), limits.min, limits.max).astype(target)
    return voxels.astype(target)


def display_axes(volume: Volume) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How array axes must be ordered and flipped to give (slice, row, column) as a radiologist looks at them.

    Slices are axial unless the voxels are at least 1.5 times as long along another axis, which then counts the slices. Axial:
    rows from anterior to posterior, columns from the patient's right to left (right is on the image's left), slices from inferior
    to superior. Coronal: rows from superior to inferior, columns right to left. Sagittal: rows superior to inferior, columns
    anterior to posterior.

    Returns
    -------
    order : tuple of three ints
        Array axis that gives slices, rows and columns.
    flips : tuple of three bools
        Whether that axis runs the other way.
    """
    ornt = nib.orientations.io_orientation(volume.affine)
    world = [int(axis) for axis in ornt[:, 0]]  # patient axis (0 right, 1 anterior, 2 superior) along which each array axis runs
    signs = [float(sign) for sign in ornt[:, 1]]
    array_axis = {patient_axis: axis for axis, patient_axis in enumerate(world)}
    spacing = volume.spacing_mm
    thickest = int(np.argmax(spacing))
    others = [spacing[axis] for axis in range(3) if axis != thickest]
    slice_axis = world[thickest] if spacing[thickest] >= 1.5 * max(others) else 2
    row_axis, column_axis = {2: (1, 0), 1: (2, 0), 0: (2, 1)}[slice_axis]
    wanted = {slice_axis: 1.0, row_axis: -1.0, column_axis: -1.0}  # against patient axes: down and to the left is negative
    order = array_axis[slice_axis], array_axis[row_axis], array_axis[column_axis]
    flips = tuple(signs[array_axis[axis]] != wanted[axis] for axis in (slice_axis, row_axis, column_axis))
    return order, (flips[0], flips[1], flips[2])


def to_display(volume: Volume) -> np.ndarray:
    """The voxels as (slices, rows, columns) in the orientation of `display_axes`; a view."""
    order, flips = display_axes(volume)
    steps = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    return volume.voxels.transpose(order)[steps]


def from_display(stack: np.ndarray, like: Volume) -> Volume:
    """The inverse of `to_display`: put a (slices, rows, columns) stack on the grid of `like`."""
    order, flips = display_axes(like)
    steps = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    return replace(like, voxels=np.ascontiguousarray(stack[steps].transpose(np.argsort(order)), dtype=np.float32))
