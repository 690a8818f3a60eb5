"""The three restoration tasks, their units and intensity ranges.

Ranges and evaluation windows are those of the published all-in-one benchmark (AMIR, MICCAI 2024; used by TAT, arXiv:2512.14550).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # who only reads a site's file need not wait for torch
    import torch

ArrayLike = TypeVar("ArrayLike", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class Task:
    """One restoration task.

    Attributes
    ----------
    name : str
        ``"CT"``, ``"MRI"`` or ``"PET"``.
    unit : str
        Physical unit of the voxels: ``"HU"``, ``"a.u."`` (scanner units) or ``"SUV"`` (body weight).
    intensity_range : tuple[float, float]
        The physical values that the network sees as 0 and 1.
    evaluation_window : tuple[float, float]
        Both images are clipped to it before any metric is computed.
    degradation : str
        What separates the low-quality image from the high-quality one.
    """

    name: str
    unit: str
    intensity_range: tuple[float, float]
    evaluation_window: tuple[float, float]
    degradation: str


CT = Task("CT", "HU", (-1024.0, 3072.0), (-160.0, 240.0), "low dose")
MRI = Task("MRI", "a.u.", (0.0, 4095.0), (0.0, 4095.0), "low resolution (k-space centre)")
PET = Task("PET", "SUV", (0.0, 20.0), (0.0, 20.0), "low count")

TASKS: dict[str, Task] = {task.name: task for task in (CT, MRI, PET)}


def normalise(image: ArrayLike, task: Task) -> ArrayLike:
    """Map physical values to [0, 1] by the task's intensity range, clipping what lies outside.

    Parameters
    ----------
    image : numpy.ndarray or torch.Tensor, any shape
        Values in ``task.unit``.
    task : Task

    Returns
    -------
    Same type and shape, values in [0, 1].
    """
    low, high = task.intensity_range
    return ((image - low) / (high - low)).clip(0.0, 1.0)


def denormalise(image: ArrayLike, task: Task) -> ArrayLike:
    """Map network values back to ``task.unit``; the inverse of `normalise` inside the range."""
    low, high = task.intensity_range
    return image * (high - low) + low
