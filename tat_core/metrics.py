"""PSNR, SSIM and RMSE in physical units, exactly as the all-in-one benchmark defines them.

Definition (AMIR, MICCAI 2024; used by TAT, arXiv:2512.14550), per slice: clip both images to the task's evaluation window;
``data_range`` is the maximum minus the minimum of the clipped target; SSIM after pytorch-ssim (11×11 Gaussian, σ 1.5, K .01, .03;
zero padding, mean over every pixel); RMSE in the task's unit; then the mean over slices. Other libraries pad, crop or scale
otherwise, and the same error scores many dB differently under another window: print window and data range beside every number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tat_core.tasks import Task

# Printed beside every table of scores: a PSNR means nothing without it.
DATA_RANGE = "per slice: target max − min after clipping"
# The PSNR of two equal images is infinite, and one such slice would make every mean infinite and the JSON invalid.
MAX_PSNR_DB = 100.0

_WINDOW_SIZE = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_OFFSETS = np.arange(_WINDOW_SIZE) - _WINDOW_SIZE // 2
_GAUSSIAN = np.exp(-(_OFFSETS**2) / (2 * _SIGMA**2))
_GAUSSIAN /= _GAUSSIAN.sum()


@dataclass(frozen=True)
class Scores:
    """Sums over slices: add them over slices, patients or hospitals, then take the mean.

    Attributes
    ----------
    count : int
        Slices scored.
    psnr_sum, ssim_sum, rmse_sum : float
        In dB, without unit, and in the task's unit.
    """

    count: int = 0
    psnr_sum: float = 0.0
    ssim_sum: float = 0.0
    rmse_sum: float = 0.0

    @classmethod
    def of_slice(cls, scores: dict[str, float]) -> Scores:
        """The sums of a single slice, from what `slice_scores` returned."""
        return cls(1, scores["psnr"], scores["ssim"], scores["rmse"])

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.count + other.count,
            self.psnr_sum + other.psnr_sum,
            self.ssim_sum + other.ssim_sum,
            self.rmse_sum + other.rmse_sum,
        )

    def mean(self) -> dict[str, float]:
        """Mean over slices: keys ``psnr``, ``ssim``, ``rmse`` and ``count``.

        Raises
        ------
        ValueError
            If no slice was scored.
        """
        if self.count == 0:
            raise ValueError("mean of scores: expected at least one slice, got none; check count first")
        return {
            "psnr": self.psnr_sum / self.count,
            "ssim": self.ssim_sum / self.count,
            "rmse": self.rmse_sum / self.count,
            "count": self.count,
        }


def is_scorable(lq: np.ndarray, hq: np.ndarray, task: Task) -> bool:
    """Whether a pair can be scored: both finite, and the target not constant inside the evaluation window (a CT slice of air)."""
    if not (np.isfinite(lq).all() and np.isfinite(hq).all()):
        return False
    return data_range(hq, task) > 0


def data_range(target: np.ndarray, task: Task) -> float:
    """Maximum minus minimum of a target clipped to the evaluation window, in ``task.unit``: what PSNR and SSIM refer to."""
    clipped = np.clip(target.astype(np.float64), *task.evaluation_window)
    return float(clipped.max() - clipped.min())


def slice_scores(image: np.ndarray, target: np.ndarray, task: Task) -> dict[str, float]:
    """Score one slice against its target in the benchmark's definition (see the module).

    Parameters
    ----------
    image, target : numpy.ndarray, shape (H, W)
        Physical values in ``task.unit``.
    task : Task

    Returns
    -------
    dict
        ``psnr`` in dB (at most 100), ``ssim`` in [-1, 1], ``rmse`` in ``task.unit``.

    Raises
    ------
    ValueError
        If shapes differ or are not 2-D, a value is not finite, or the clipped target is constant.
    """
    if image.ndim != 2 or image.shape != target.shape:
        raise ValueError(
            f"score a slice: expected two images of one 2-D shape, got {image.shape} and {target.shape}; score slices one by one"
        )
    for name, values in (("image", image), ("target", target)):
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            raise ValueError(
                f"score a slice: expected finite values, got {bad} NaN or infinite in the {name}; "
                "check the data set, or the model if this is its output"
            )
    x, y = (np.clip(values.astype(np.float64), *task.evaluation_window) for values in (image, target))
    span = data_range(target, task)
    if span == 0:
        low, high = task.evaluation_window
        raise ValueError(
            f"score a slice: expected a target that varies inside the window [{low:g}, {high:g}] {task.unit}, "
            "got a constant one; leave such slices out"
        )
    mse = float(np.mean((x - y) ** 2))
    psnr = MAX_PSNR_DB if mse == 0 else min(MAX_PSNR_DB, 10 * math.log10(span**2 / mse))
    return {"psnr": psnr, "ssim": float(ssim_map(x, y, span).mean()), "rmse": math.sqrt(mse)}


def ssim_map(x: np.ndarray, y: np.ndarray, span: float) -> np.ndarray:
    """SSIM of every pixel, as in pytorch-ssim: Gaussian 11×11, σ 1.5, zeros beyond the border.

    Parameters
    ----------
    x, y : numpy.ndarray, shape (H, W), float64
    span : float
        The data range that the two stabilising constants refer to.

    Returns
    -------
    numpy.ndarray, shape (H, W)
    """
    # The two variances only appear as a sum, so four blurred maps do instead of five.
    mean_x, mean_y, mean_squares, mean_xy = (_blur(values) for values in (x, y, x * x + y * y, x * y))
    product = mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    return ((2 * product + c1) * (2 * (mean_xy - product) + c2)) / ((squares + c1) * (mean_squares - squares + c2))


def _blur(image: np.ndarray) -> np.ndarray:
    rows = ndimage.correlate1d(image, _GAUSSIAN, axis=0, mode="constant")
    return ndimage.correlate1d(rows, _GAUSSIAN, axis=1, mode="constant")
