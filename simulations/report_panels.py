"""Pictures for the report: every pixel as it is, at one stated window, with the error beside it."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from simulations.results import three_digits
from tat_core.metrics import slice_scores
from tat_core.tasks import Task

# Shown so large at least: the pixels of a small picture are repeated, never interpolated.
_MIN_SIDE = 512
# The error's scale as a share of the display window.
_ERROR_SHARE = 0.25
_ERROR_COLOURS = "inferno"
_ARMS = {
    "lq": "Input",
    "alone": "Trained alone",
    "together": "Trained together",
    "fine_tuned": "Together, fine-tuned",
    "hq": "Target",
}


@dataclass(frozen=True)
class Picture:
    """One picture: a data URI, its title and what is measured on it."""

    uri: str
    title: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """All pictures of one slice: images over their errors, same order; the target has no error."""

    images: list[Picture]
    errors: list[Picture]
    window: str
    inverted: bool
    error_top: str
    colour_bar: str


def read_panel(path: Path, task: Task) -> Panel:
    """Pictures of one hospital's slice.

    Parameters
    ----------
    path : pathlib.Path
        An ``.npz`` with 2-D arrays ``lq``, ``hq`` and any of ``alone``, ``together`` and ``fine_tuned``, in ``task.unit``; rows
        anterior to posterior, columns from the patient's right to left.
    task : Task

    Raises
    ------
    ValueError
        If it cannot be read, or an array is missing, not 2-D or of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.float64) for name in _ARMS if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read a panel: expected an .npz of arrays, got {type(error).__name__}; run the simulation again"
        ) from error
    shapes = {array.shape for array in arrays.values()}
    if not {"lq", "hq"} <= set(arrays) or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"read a panel: expected 2-D arrays lq and hq of one shape, got {sorted(arrays)} of {sorted(shapes)}; "
            "run the simulation again"
        )
    window = display_window(arrays["hq"], task)
    error_top = _ERROR_SHARE * (window[1] - window[0])
    inverted = task.name == "PET"
    images, errors = [], []
    for name, title in _ARMS.items():
        if name not in arrays:
            continue
        psnr, rmse = ("", "") if name == "hq" else _measures(arrays[name], arrays["hq"], task)
        images.append(Picture(_grey(arrays[name], window, inverted), title, psnr))
        if name != "hq":
            # What the scores see: nothing outside the evaluation window.
            image, target = (np.clip(arrays[key], *task.evaluation_window) for key in (name, "hq"))
            difference = np.abs(image - target)
            errors.append(Picture(_coloured(difference, error_top), f"|error|, {title.lower()}", rmse))
    return Panel(
        images,
        errors,
        f"{_number(window[0])} to {_number(window[1])} {task.unit}",
        inverted,
        f"{_number(error_top)} {task.unit}",
        _colour_bar(),
    )


def display_window(target: np.ndarray, task: Task) -> tuple[float, float]:
    """The grey scale's ends: CT fixed at the evaluation window, MRI and PET from 0 to what their target needs.

    A scanner's MRI units have no fixed meaning, so the 99.5th percentile is white. PET goes to the next whole SUV above the
    99.9th percentile, so that a few hot pixels do not blank the rest.
    """
    if task.name == "CT":
        return task.evaluation_window
    percentile = 99.9 if task.name == "PET" else 99.5
    finite = target[np.isfinite(target)]
    top = float(np.percentile(finite, percentile)) if finite.size else 0.0
    if task.name == "PET":
        top = float(np.ceil(top))
    return (0.0, top if top > 0 else task.evaluation_window[1])


def _measures(image: np.ndarray, target: np.ndarray, task: Task) -> tuple[str, str]:
    try:
        scores = slice_scores(image, target, task)
    except ValueError:
        return "not scored", "not scored"
    return f"{scores['psnr']:.2f} dB · SSIM {scores['ssim']:.4f}", f"RMSE {three_digits(scores['rmse'])} {task.unit}"


def _grey(image: np.ndarray, window: tuple[float, float], inverted: bool) -> str:
    low, high = window
    levels = _levels((image - low) / (high - low))
    return _png(Image.fromarray(255 - levels if inverted else levels))


def _coloured(difference: np.ndarray, top: float) -> str:
    picture = Image.fromarray(_levels(difference / top), mode="P")
    picture.putpalette(_palette())
    return _png(picture)


def _colour_bar() -> str:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8)[None], mode="P")
    picture.putpalette(_palette())
    return _uri(picture)


def _palette() -> list[int]:
    colours = colormaps[_ERROR_COLOURS](np.arange(256), bytes=True)[:, :3]
    return [int(value) for value in colours.ravel()]


def _levels(share: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.nan_to_num(share).clip(0, 1)).astype(np.uint8)


def _png(picture: Image.Image) -> str:
    repeat = max(1, round(_MIN_SIDE / max(picture.size)))
    return _uri(picture.resize((picture.width * repeat, picture.height * repeat), Image.Resampling.NEAREST))


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float) -> str:
    return f"{value:.0f}".replace("-", "−") if value == round(value) else three_digits(value)
