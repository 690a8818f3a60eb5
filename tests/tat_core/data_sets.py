"""A small data set on disk for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tat_core.data.volume import Volume, write_nifti

SPLITS_OF_TEN = ["train"] * 8 + ["validation", "test"]
TEN = {f"case-{k:02}": {"patient": f"p{k:02}", "split": split} for k, split in enumerate(SPLITS_OF_TEN)}


def head(seed: int, shape: tuple[int, int, int] = (40, 36, 4)) -> Volume:
    """A CT that passes all checks: air, a body of water with some detail."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[: shape[0], : shape[1]]
    inside = (x - shape[0] / 2) ** 2 + (y - shape[1] / 2) ** 2 < (0.4 * shape[1]) ** 2
    detail = rng.normal(40, 60, shape)
    detail[10:14, 10:20, :] += 300
    return Volume(np.where(inside[..., None], detail, -1000).astype(np.float32), np.diag([-1.0, -1.0, 3.0, 1.0]), "HU")


def with_noise(volume: Volume, seed: int) -> Volume:
    noise = np.random.default_rng(seed).normal(0, 20, volume.voxels.shape)
    return Volume((volume.voxels + noise).astype(np.float32), volume.affine, volume.unit)


def make_data_set(folder: Path, cases: dict[str, dict[str, str]] | None = None) -> Path:
    """Ten CT patients, eight of them for training."""
    listed = TEN if cases is None else cases
    for number, name in enumerate(sorted(listed)):
        volume = head(number)
        write_nifti(volume, folder / "HQ" / f"{name}.nii.gz")
        write_nifti(with_noise(volume, 100 + number), folder / "LQ" / f"{name}.nii.gz")
    write_splits(folder, listed)
    about = {
        "format": 1,
        "name": "test",
        "task": "CT",
        "unit": "HU",
        "low_quality": {"origin": "simulated"},
        "split_by": "patient",
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def write_splits(folder: Path, cases: dict[str, dict[str, str]]) -> None:
    (folder / "splits.json").write_text(json.dumps({"format": 1, "cases": cases}))
