"""Restore slices of any size with one model, and score a split of prepared slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tat_core.config import EvaluateConfig
from tat_core.metrics import Scores, data_range, is_scorable, slice_scores
from tat_core.tasks import Task, denormalise, normalise

if TYPE_CHECKING:
    from tat_core.data.prepared import PreparedSplit

__all__ = ["Scores", "SliceScores", "evaluate_split", "restore_image", "score_slices", "slice_scores", "spread"]


@dataclass(frozen=True)
class SliceScores:
    """The scores of one slice of a split.

    Attributes
    ----------
    index : int
        Its place in the split.
    data_range : float or None
        What PSNR and SSIM refer to, in the task's unit; None if the slice cannot be scored.
    arms : dict of str to Scores
        ``input`` and, given a model, ``restored``; empty if the slice cannot be scored.
    """

    index: int
    data_range: float | None
    arms: dict[str, Scores]


def restore_image(
    model: nn.Module,
    lq: np.ndarray,
    task: Task,
    tile_size: int,
    tile_overlap: int,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Restore one slice, whole if it fits into a tile, else in overlapping tiles blended without seams.

    Parameters
    ----------
    model : torch.nn.Module
        Maps (1, 1, H, W) float32 in [0, 1] to the same shape; moved to ``device`` and left there. Its training mode is left as it
        was.
    lq : numpy.ndarray, shape (H, W)
        Physical values in ``task.unit``; what lies outside ``task.intensity_range`` is clipped.
    task : Task
    tile_size, tile_overlap : int
        In pixels, ``0 <= tile_overlap < tile_size``. Tiles overlap by at least ``tile_overlap``.
    device : torch.device or str

    Returns
    -------
    numpy.ndarray, shape (H, W), float32
        Physical values inside ``task.intensity_range``.

    Raises
    ------
    ValueError
        If ``lq`` is not a finite, non-empty 2-D image, or the tiles are impossible.
    """
    if lq.ndim != 2 or lq.size == 0:
        raise ValueError(f"restore: expected a non-empty 2-D image, got shape {lq.shape}; restore a volume slice by slice")
    if not np.isfinite(lq).all():
        raise ValueError("restore: expected finite values, got NaN or infinity in the input; run the data check on it")
    if not 0 <= tile_overlap < tile_size:
        raise ValueError(
            f"restore: expected 0 <= tile_overlap < tile_size, got {tile_overlap} and {tile_size}; "
            "change evaluate.tile_overlap or evaluate.tile_size"
        )
    pixels = normalise(torch.from_numpy(lq.astype(np.float32)).to(device), task)
    with _inference(model, pixels.device):
        restored = _restore_tiles(model, pixels, tile_size, tile_overlap)
    return denormalise(restored.clip(0.0, 1.0), task).cpu().numpy()


def evaluate_split(
    model: nn.Module | None,
    split: PreparedSplit,
    config: EvaluateConfig,
    device: torch.device | str = "cpu",
    max_slices: int | None = None,
) -> dict[str, Scores]:
    """Score the input, and what the model makes of it, over a split.

    Parameters
    ----------
    model : torch.nn.Module or None
        None scores the input alone.
    split : PreparedSplit
        Slices in physical units; may be empty.
    config : EvaluateConfig
        Tile size and overlap.
    device : torch.device or str
    max_slices : int, optional
        Score at most so many slices, spread evenly over the split; the same ones each time.

    Returns
    -------
    dict
        ``input`` and, given a model, ``restored``. Slices that cannot be scored (see `metrics.is_scorable`) are left out of both.

    Raises
    ------
    ValueError
        If the model's output is not finite.
    """
    arms = {"input": Scores()} if model is None else {"input": Scores(), "restored": Scores()}
    for scored in score_slices(model, split, config, device, max_slices):
        for arm, scores in scored.arms.items():
            arms[arm] += scores
    return arms


def score_slices(
    model: nn.Module | None,
    split: PreparedSplit,
    config: EvaluateConfig,
    device: torch.device | str = "cpu",
    max_slices: int | None = None,
) -> Iterator[SliceScores]:
    """Score slice by slice; parameters and errors as `evaluate_split`."""
    for index in spread(len(split), max_slices):
        lq, hq = split.pair(index)
        if not is_scorable(lq, hq, split.task):
            yield SliceScores(index, None, {})
            continue
        images = {"input": lq}
        if model is not None:
            images["restored"] = restore_image(model, lq, split.task, config.tile_size, config.tile_overlap, device)
        arms = {arm: Scores.of_slice(slice_scores(image, hq, split.task)) for arm, image in images.items()}
        yield SliceScores(index, data_range(hq, split.task), arms)


def spread(length: int, at_most: int | None) -> list[int]:
    """Indices of at most ``at_most`` items, evenly spread over ``length`` (each in the middle of its share)."""
    if at_most is None or at_most >= length:
        return list(range(length))
    return [(2 * i + 1) * length // (2 * at_most) for i in range(at_most)]


@contextmanager
def _inference(model: nn.Module, device: torch.device) -> Iterator[None]:
    was_training = model.training
    model.to(device).eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        model.train(was_training)


def _restore_tiles(model: nn.Module, pixels: torch.Tensor, tile_size: int, tile_overlap: int) -> torch.Tensor:
    height, width = pixels.shape
    if height <= tile_size and width <= tile_size:
        return model(pixels[None, None])[0, 0]
    tile_height, tile_width = min(height, tile_size), min(width, tile_size)
    weight = torch.outer(_ramp(tile_height, tile_overlap), _ramp(tile_width, tile_overlap)).to(pixels.device)
    total = torch.zeros_like(pixels)
    weights = torch.zeros_like(pixels)
    for top in _starts(height, tile_height, tile_overlap):
        for left in _starts(width, tile_width, tile_overlap):
            place = (slice(top, top + tile_height), slice(left, left + tile_width))
            total[place] += weight * model(pixels[place][None, None])[0, 0]
            weights[place] += weight
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis: evenly, covering all of it, each sharing at least ``overlap`` pixels with the next."""
    if length <= tile:
        return [0]
    number = 1 + -(-(length - tile) // (tile - overlap))
    return [round(i * (length - tile) / (number - 1)) for i in range(number)]


def _ramp(length: int, overlap: int) -> torch.Tensor:
    """Weights along one axis of a tile: 1 inside, falling smoothly, but never to 0, over ``overlap`` pixels at either end."""
    distance = torch.arange(length, dtype=torch.float32) + 0.5
    to_edge = torch.minimum(distance, length - distance)
    return torch.sin(torch.pi / 2 * (to_edge / max(overlap, 1)).clamp(max=1.0)) ** 2
