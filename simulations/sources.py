"""The sample images as volumes that lie ready for simulation: display orientation, cut into slices, shrunk for quick tests."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from tat_core.data.volume import Volume, display_axes, read_volume, to_display
from tat_core.tasks import Task

IMAGES = Path(__file__).parent / "images"


def images_hash() -> str:
    """One hash over all sample images."""
    digest = hashlib.sha256()
    for path in sorted(path for path in IMAGES.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(IMAGES).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(name: str, task: Task) -> Volume:
    """Read a sample image and lay its axes as i: patient right to left, j: anterior to posterior, k: inferior to superior."""
    volume = read_volume(IMAGES / name, task)
    order, flips = display_axes(volume)
    stack = to_display(volume)
    affine = np.eye(4)
    origin = np.zeros(3)
    for column, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        affine[:3, 2 - column] = volume.affine[:3, axis] * (-1 if flip else 1)
        origin[axis] = volume.voxels.shape[axis] - 1 if flip else 0
    affine[:3, 3] = volume.affine[:3, :3] @ origin + volume.affine[:3, 3]
    return replace(volume, voxels=np.ascontiguousarray(stack.transpose(2, 1, 0)), affine=affine)


def slices_of(volume: Volume) -> np.ndarray:
    """The voxels of a loaded volume as (slices, rows, columns)."""
    return volume.voxels.transpose(2, 1, 0)


def with_slices(volume: Volume, stack: np.ndarray) -> Volume:
    """The same grid with other voxels, given as (slices, rows, columns)."""
    return replace(volume, voxels=np.ascontiguousarray(stack.transpose(2, 1, 0), dtype=np.float32))


def cut(volume: Volume, start: int, stop: int, step: int = 1) -> Volume:
    """Some of the slices; the affine follows."""
    affine = volume.affine.copy()
    affine[:3, 3] += start * volume.affine[:3, 2]
    affine[:3, 2] *= step
    return replace(volume, voxels=volume.voxels[:, :, start:stop:step], affine=affine)


def shrink(volume: Volume, factor: int) -> Volume:
    """Average factor × factor pixels in the plane; what does not fill a pixel at the border is cut off."""
    if factor == 1:
        return volume
    columns, rows = volume.voxels.shape[0] // factor, volume.voxels.shape[1] // factor
    trimmed = volume.voxels[: columns * factor, : rows * factor]
    voxels = trimmed.reshape(columns, factor, rows, factor, -1).mean((1, 3))
    affine = volume.affine.copy()
    affine[:3, 3] += (factor - 1) / 2 * (affine[:3, 0] + affine[:3, 1])
    affine[:3, :2] *= factor
    return replace(volume, voxels=voxels, affine=affine)


def pad_square(volume: Volume, size: int) -> Volume:
    """Centre the slices in size × size pixels of zeros."""
    columns, rows, slices = volume.voxels.shape
    left, top = (size - columns) // 2, (size - rows) // 2
    voxels = np.zeros((size, size, slices), np.float32)
    voxels[left : left + columns, top : top + rows] = volume.voxels
    affine = volume.affine.copy()
    affine[:3, 3] -= left * affine[:3, 0] + top * affine[:3, 1]
    return replace(volume, voxels=voxels, affine=affine)
