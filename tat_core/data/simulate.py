"""Make the low-quality side of a data set that only has good images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter

from tat_core.data.dataset import open_data_set, read_json, write_json
from tat_core.data.degrade import ct_low_dose, mri_super_resolution
from tat_core.data.degrade_pet import MU_WATER_511_PER_MM, PetScanner, pet_low_count
from tat_core.data.parallel import run_each
from tat_core.data.volume import Volume, display_axes, from_display, read_volume, to_display, write_nifti
from tat_core.tasks import TASKS

DEFAULTS: dict[str, dict[str, float]] = {
    "CT": {"dose_fraction": 0.25, "photons": 2e5},
    "MRI": {"factor": 4},
    "PET": {"dose_reduction": 10.0, "counts_per_slice": 1e6},
}


def simulate_low_quality(
    folder: Path, settings: dict[str, float] | None = None, seed: int = 42, workers: int = 1
) -> dict[str, str]:
    """Write ``LQ/<case>.nii.gz`` for every case that has an HQ and no LQ, and record in dataset.json how.

    Parameters
    ----------
    folder : pathlib.Path
        Data set with dataset.json, splits.json and HQ.
    settings : dict, optional
        Over `DEFAULTS` of the task: CT ``dose_fraction``, ``photons``; MRI ``factor``; PET ``dose_reduction``,
        ``counts_per_slice``.
    seed : int
        Together with the case's name decides the noise, so that the order of work does not matter.
    workers : int
        Processes.

    Returns
    -------
    dict[str, str]
        Cases that could not be simulated and why.

    Raises
    ------
    ValueError
        If a setting is unknown, or the data set has other low-quality images already that were acquired.
    """
    data = open_data_set(folder)
    used = DEFAULTS[data.task.name] | (settings or {})
    if unknown := sorted(set(used) - set(DEFAULTS[data.task.name])):
        raise ValueError(
            f"simulate: expected settings {', '.join(DEFAULTS[data.task.name])}, got {', '.join(unknown)}; correct the name"
        )
    parameters = {"origin": "simulated", "seed": seed, **used}
    present = data.about.get("low_quality", {})
    missing = [case for case in data.cases if case.hq is not None and case.lq is None]
    if len(missing) < sum(case.hq is not None for case in data.cases) and present != parameters:
        raise ValueError("simulate: expected no LQ images or ones of the same settings, got others; move LQ away first")
    about = read_json(folder / "dataset.json", "simulate")
    write_json(folder / "dataset.json", about | {"low_quality": parameters})
    (folder / "LQ").mkdir(exist_ok=True)
    jobs = [(case.name, case.hq, data.task.name, folder / "LQ" / f"{case.name}.nii.gz", used, seed) for case in missing]
    return {
        job[0]: str(outcome)
        for job, outcome in run_each(_simulate_case, jobs, workers, "Simulating LQ")
        if isinstance(outcome, ValueError)
    }


def _simulate_case(job: tuple[str, Path | None, str, Path, dict[str, float], int]) -> None:
    name, source, task_name, target, settings, seed = job
    assert source is not None
    hq = read_volume(source, TASKS[task_name])
    rng = np.random.default_rng([seed, *name.encode("utf-8", "surrogateescape")])
    write_nifti(degrade(hq, task_name, settings, rng), target, np.int16 if task_name == "CT" else np.float32)


def degrade(hq: Volume, task_name: str, settings: dict[str, float], rng: np.random.Generator) -> Volume:
    """The low-quality volume that belongs to a good one, on the same grid.

    CT and PET get the noise that less dose would have added (PET: low-count minus full-count image of a simulated scan of the
    image itself, in a body of
    water), so that their own resolution and noise stay. MRI loses the outer part of k-space.
    """
    stack = np.ascontiguousarray(to_display(hq))
    if task_name == "MRI":
        return from_display(mri_super_resolution(stack, int(settings["factor"])), hq)
    order, _ = display_axes(hq)
    spacing_mm = hq.spacing_mm[order[1]]
    if abs(spacing_mm - hq.spacing_mm[order[2]]) > 0.01 * spacing_mm:
        raise ValueError("simulate: expected square pixels, got others; resample the images first")
    size = max(stack.shape[1:]) + max(stack.shape[1:]) % 2
    square, window = _square(stack, size, -1000.0 if task_name == "CT" else 0.0)
    if task_name == "CT":
        noisy = ct_low_dose(square, spacing_mm, settings["dose_fraction"], settings["photons"], rng)
    else:
        low, full = pet_low_count(*_phantom(square), spacing_mm, settings["dose_reduction"], _scanner(settings), rng)
        noisy = np.maximum(square + low - full, 0.0)
    return from_display(noisy[window], hq)


def _square(stack: np.ndarray, size: int, fill: float) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    rows, columns = stack.shape[1:]
    top, left = (size - rows) // 2, (size - columns) // 2
    square = np.full((len(stack), size, size), fill, np.float32)
    window = slice(None), slice(top, top + rows), slice(left, left + columns)
    square[window] = stack
    return square, window


def _phantom(suv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image as activity, and water wherever there is a body around it."""
    activity = np.maximum(suv, 0.0)
    body = gaussian_filter(activity, (0, 2, 2)) > 0.05
    filled = np.stack([binary_fill_holes(slice_) for slice_ in body])
    return activity, np.where(filled, np.float32(MU_WATER_511_PER_MM), np.float32(0.0))


def _scanner(settings: dict[str, float]) -> PetScanner:
    return replace(PetScanner(), counts_per_slice=settings["counts_per_slice"])
