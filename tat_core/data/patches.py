"""Random training crops from prepared splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tat_core.data.prepared import PreparedSplit


@dataclass(frozen=True)
class Batch:
    """Training pairs.

    Attributes
    ----------
    lq, hq : torch.Tensor, (B, 1, P, P), float32, in [0, 1]
    tasks : tuple[str, ...]
        Task name of each pair, length B.
    """

    lq: torch.Tensor
    hq: torch.Tensor
    tasks: tuple[str, ...]


def sample_batch(
    splits: Mapping[str, PreparedSplit],
    batch_size: int,
    patch_size: int,
    rng: np.random.Generator,
    *,
    augment: bool = False,
) -> Batch:
    """Draw pairs: task uniform, slice uniform within the task, crop uniform within the slice.

    Parameters
    ----------
    splits : mapping from task name to PreparedSplit
        Empty ones are passed over.
    batch_size, patch_size : int
    rng : numpy.random.Generator
    augment : bool
        Flip and transpose at random.

    Returns
    -------
    Batch
        Slices smaller than the patch are continued by reflection.

    Raises
    ------
    ValueError
        If there is no slice at all.
    """
    names = [name for name in sorted(splits) if len(splits[name])]
    if not names:
        raise ValueError("sample_batch: expected at least one slice, got only empty splits; check splits.json")
    pairs = np.empty((2, batch_size, 1, patch_size, patch_size), np.float32)
    chosen = [names[number] for number in rng.integers(len(names), size=batch_size)]
    for b, name in enumerate(chosen):
        _crop(splits[name], int(rng.integers(len(splits[name]))), rng, out=pairs[:, b, 0])
    if augment:
        _augment(pairs, rng)
    return Batch(torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]), tuple(chosen))


def sample_patient(
    splits: Mapping[str, PreparedSplit], patient: str, count: int, patch_size: int, rng: np.random.Generator
) -> Batch:
    """Draw pairs of one patient: slice uniform among all that the splits hold of the patient, crop uniform within the slice."""
    slices = [(task, index) for task in sorted(splits) for index in splits[task].slices_by_patient.get(patient, ())]
    chosen = [slices[number] for number in rng.integers(len(slices), size=count)]
    pairs = np.empty((2, count, 1, patch_size, patch_size), np.float32)
    for b, (task, index) in enumerate(chosen):
        _crop(splits[task], index, rng, out=pairs[:, b, 0])
    return Batch(torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]), tuple(task for task, _ in chosen))


def _crop(split: PreparedSplit, index: int, rng: np.random.Generator, out: np.ndarray) -> None:
    """Write a random crop of a slice's two sides, mapped to 0..1, into `out` (2, P, P)."""
    size = out.shape[-1]
    lq, hq = (_at_least(image, size) for image in split.pair(index))
    top = int(rng.integers(lq.shape[0] - size + 1))
    left = int(rng.integers(lq.shape[1] - size + 1))
    window = slice(top, top + size), slice(left, left + size)
    low, high = split.task.intensity_range
    for patch, image in zip(out, (lq, hq), strict=True):
        np.subtract(image[window], np.float32(low), out=patch)
        patch *= np.float32(1.0 / (high - low))
        np.clip(patch, 0.0, 1.0, out=patch)


def _at_least(image: np.ndarray, size: int) -> np.ndarray:
    if min(image.shape) >= size:
        return image
    padding = [((size - n) // 2, size - n - (size - n) // 2) if n < size else (0, 0) for n in image.shape]
    return np.pad(image, padding, mode="reflect")


def _augment(pairs: np.ndarray, rng: np.random.Generator) -> None:
    for b in range(pairs.shape[1]):
        flip_rows, flip_columns, transpose = rng.integers(2, size=3)
        view = pairs[:, b, 0]
        turned = view[:, :: 1 - 2 * flip_rows, :: 1 - 2 * flip_columns]
        pairs[:, b, 0] = (turned.transpose(0, 2, 1) if transpose else turned).copy()
